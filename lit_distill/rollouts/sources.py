"""Whose text: a source turns the batch of a data module into the mini-batches that are learnt from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_distill.types import Batch, Sequences


class Source(ABC):
    """Whose text the objectives see, and how often it is used."""

    provides: frozenset[str]
    """The signals its text carries, besides the teacher's logits, which a teacher gives."""

    @abstractmethod
    def mini_batches(self, batch: Batch) -> Iterator[Sequences]:
        """The texts of each optimiser step that ``batch`` is good for.

        Raises:
            ValueError: if the batch lacks what the source needs.
        """


class DatasetResponses(Source):
    """The responses of the dataset, each used once: SFT, KD, and SeqKD from a file that `predict` wrote."""

    provides = frozenset({"student_logits", "labels"})

    def mini_batches(self, batch: Batch) -> Iterator[Sequences]:
        """The batch itself."""
        if batch.sequences is None:
            raise ValueError(
                "model.source: DatasetResponses learns from the responses in the data, and there are none. "
                "Set data.init_args.responses: true, or choose a source that generates."
            )
        yield batch.sequences
