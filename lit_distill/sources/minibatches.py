"""Mini-batches of a phase: the sequences of one batch, used for several inner epochs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from lit_distill.generation.sampling import keyed_generator
from lit_distill.types import Pairs, Sequences

Text = TypeVar("Text", Sequences, Pairs)


def check_phase(mini_batch_size: int | None, trainer: Any) -> None:
    """Reject mini-batches that are larger than a phase, and ranks that would not have equally many of them.

    A phase has as many sequences as a batch of the data.

    Raises:
        ValueError: with the argument.
    """
    data = trainer.datamodule
    if mini_batch_size is None or not hasattr(data, "batch_size"):
        return
    num_items = data.num_items("train") if hasattr(data, "num_items") else data.batch_size
    if mini_batch_size > data.batch_size or mini_batch_size > num_items:
        raise ValueError(
            f"mini_batch_size: {mini_batch_size} is larger than a phase, which has data.init_args.batch_size "
            f"({data.batch_size}) sequences, out of {num_items} items to train on. Set a smaller mini-batch, or a larger batch."
        )
    sharing: dict[str, int] = getattr(trainer, "distributed_sampler_kwargs", None) or {}
    ranks = sharing.get("num_replicas", 1)
    if mini_batch_size % ranks:
        raise ValueError(
            f"mini_batch_size: {mini_batch_size} on {ranks} ranks cannot be shared equally. Set a multiple of {ranks}."
        )
    size = mini_batch_size // ranks
    fewest, most = data.batch_size // ranks, -(-data.batch_size // ranks)
    if -(-fewest // size) != -(-most // size):
        raise ValueError(
            f"mini_batch_size: {mini_batch_size} with data.init_args.batch_size {data.batch_size} on {ranks} ranks: some would "
            f"have more mini-batches than others. Set a batch_size that is a multiple of {ranks}."
        )


def mini_batches(
    text: Text, mini_batch_size: int, inner_epochs: int, world_size: int, order_key: tuple[int, int] | None
) -> Iterator[Text]:
    """Yield this rank's share of each mini-batch, one inner epoch after the other.

    Args:
        text: sequences or pairs of the phase that this rank has.
        mini_batch_size: sequences (or pairs) of one optimiser step, over all ranks.
        inner_epochs: number of passes over the phase.
        world_size: number of ranks.
        order_key: seed and optimiser step that determine the order, which differs in each epoch; None does not shuffle.

    Raises:
        ValueError: if a mini-batch is larger than the phase.
    """
    size = -(-mini_batch_size // world_size)
    if size > len(text):
        raise ValueError(
            f"mini_batch_size: {mini_batch_size} is larger than a phase, which has data.init_args.batch_size "
            f"({len(text) * world_size}) sequences. Set a smaller mini-batch, or a larger batch."
        )
    for epoch in range(inner_epochs):
        order = torch.arange(len(text))
        if order_key is not None:
            order = torch.randperm(len(text), generator=keyed_generator(*order_key, "order", epoch))
        for start in range(0, len(text), size):
            yield text.select(order[start : start + size])
