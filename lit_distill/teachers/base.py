"""The interface of teachers: logits and log-probabilities at the target positions of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from lit_distill.types import Sequences


class TeacherRows(Protocol):
    """A teacher's predictions at N target positions, in the order of the targets."""

    def logits(self, rows: slice) -> Tensor:
        """Logits ``[n, V]`` float32 of the selected rows, over the common vocabulary, without gradient."""
        ...

    def label_logprobs(self, labels: Tensor, chunk_rows: int | None = None) -> Tensor:
        """Log-probability ``[N]`` float32 of each label ``[N]``, computed ``chunk_rows`` rows at a time."""
        ...


class Teacher(Protocol):
    """A model that objectives compare the student with."""

    def rows(self, sequences: Sequences) -> TeacherRows:
        """The rows of all targets of ``sequences``; called once per micro-batch, and only if an objective needs them."""
        ...
