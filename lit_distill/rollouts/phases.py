"""A phase: the texts of one batch, learnt from in mini-batches for several inner epochs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from lit_distill.rollouts.decoding import stream
from lit_distill.types import Pairs, Sequences

KEY = "model.source.init_args"
Text = TypeVar("Text", Sequences, Pairs)


def check_sizes(**sizes: int | None) -> None:
    """Refuse sizes below 1, by name.

    Raises:
        ValueError: naming the key.
    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{KEY}.{name}: expected at least 1, got {size}.")


def check_phase(mini_batch_size: int | None, trainer: Any) -> None:
    """Refuse mini-batches that are larger than a phase, which is as large as a batch of the data.

    Raises:
        ValueError: naming both keys.
    """
    data = trainer.datamodule
    if mini_batch_size is None or not hasattr(data, "batch_size"):
        return
    num_items = data.num_items("train") if hasattr(data, "num_items") else data.batch_size
    if mini_batch_size > data.batch_size or mini_batch_size > num_items:
        raise ValueError(
            f"{KEY}.mini_batch_size: {mini_batch_size} is more than the texts of a phase, which are as many as "
            f"data.init_args.batch_size ({data.batch_size}), and of {num_items} items to train on. Make it smaller, or the batch "
            "larger."
        )


def mini_batches(
    text: Text, mini_batch_size: int, inner_epochs: int, world_size: int, order_key: tuple[int, int] | None
) -> Iterator[Text]:
    """This rank's share of each mini-batch, epoch after epoch.

    Args:
        text: what this rank has of the phase.
        mini_batch_size: texts of one optimiser step, over all ranks.
        inner_epochs: how often each text is learnt from.
        world_size: number of ranks.
        order_key: seed and optimiser step that fix the order, which is another one in each epoch; None keeps the text's own.

    Raises:
        ValueError: if a mini-batch is larger than the phase.
    """
    size = -(-mini_batch_size // world_size)
    if size > len(text):
        raise ValueError(
            f"{KEY}.mini_batch_size: {mini_batch_size} is more than the texts of a phase, which are as many as "
            f"data.init_args.batch_size ({len(text) * world_size}). Make it smaller, or the batch larger."
        )
    for epoch in range(inner_epochs):
        order = torch.arange(len(text))
        if order_key is not None:
            order = torch.randperm(len(text), generator=stream(*order_key, "order", epoch))
        for start in range(0, len(text), size):
            yield text.select(order[start : start + size])
