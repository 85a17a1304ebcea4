"""Prompts, and a batch of a data module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_distill.types.sequences import Item, Sequences, TensorRecord


@dataclass(frozen=True)
class Prompts(TensorRecord):
    """Prompts padded on the left, so that the first response token of every row has the same column.

    Example:
        A prompt of three tokens and one of two::

            input_ids       [[5, 6, 7], [0, 5, 6]]
            attention_mask  [[1, 1, 1], [0, 1, 1]]
    """

    input_ids: Tensor
    """[B, P] int64."""
    attention_mask: Tensor
    """[B, P] int64: 0 for the padding on the left."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def slice(self, start: int, stop: int) -> Prompts:
        """Prompts ``start`` to ``stop``, with their padding."""
        return Prompts(self.input_ids[start:stop], self.attention_mask[start:stop])

    def select(self, rows: Sequence[int]) -> Prompts:
        """The prompts at ``rows``, with their padding."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.input_ids.device)
        return Prompts(self.input_ids[index], self.attention_mask[index])


@dataclass(frozen=True)
class Batch(TensorRecord):
    """One batch of a data module: the items of one optimiser step, or of one phase of rollouts."""

    ids: tuple[str, ...]
    """Ids of the items, for messages, logged samples and predictions."""
    prompts: Prompts | None = None
    """Prompts of the items, padded for decoding; None if the step needs no prompts."""
    sequences: Sequences | None = None
    """Prompt and response of every item, padded on the right; None for data without responses."""
    references: tuple[tuple[str, ...], ...] = ()
    """Reference responses of every item as strings, none for some; empty if no item has one. Read them through `accepted`."""
    prompt_texts: tuple[str, ...] = ()
    """The prompts as strings, as given to the model."""
    fields: tuple[Mapping[str, str], ...] = ()
    """Fields of the record of every item that the teacher asks for, by name; empty if it asks for none."""
    corpus: Sequences | None = None
    """Plain text packed to a fixed length, for the pre-training loss; None if no corpus is configured."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def accepted(self) -> tuple[tuple[str, ...], ...]:
        """The reference responses of every item, also of a batch, or of a rank's share of it, in which none has one."""
        return self.references or ((),) * len(self)

    @property
    def items(self) -> tuple[Item, ...]:
        """Id and fields of every item."""
        return tuple(map(Item, self.ids, self.fields)) if self.fields else tuple(map(Item, self.ids))

    def select(self, rows: Sequence[int]) -> Batch:
        """The items at ``rows`` for generation, without their sequences and the corpus.

        If ``rows`` is empty, one dummy prompt without an id remains, as for a rank without items.
        """
        return Batch(
            ids=tuple(self.ids[i] for i in rows),
            prompts=None if self.prompts is None else self.prompts.select(rows or [0]),
            references=tuple(self.references[i] for i in rows if self.references),
            prompt_texts=tuple(self.prompt_texts[i] for i in rows if self.prompt_texts),
            fields=tuple(self.fields[i] for i in rows if self.fields),
        )
