"""The interfaces of teachers: what YAML configures, what a run then asks, and what it gets for the target positions of texts.

A teacher is configured as a `Teacher`, before anything is read. `Teacher.open` then reads what is small, `Teacher.load` the rest;
it returns the `LoadedTeacher` that answers. A teacher may have others as its parts, of any kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from lit_distill.objectives import Accuracy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_distill.distributed import Sharding
    from lit_distill.models import CausalLM, ModelSpec
    from lit_distill.types import Sequences


class TeacherRows(Protocol):
    """A teacher's predictions at N target positions, in the order of the targets."""

    def logits(self, rows: slice) -> Tensor:
        """Logits ``[n, V]`` float32 of the selected rows, over the common vocabulary, without gradient."""
        ...

    def label_logprobs(self, labels: Tensor, chunk_rows: int | None = None) -> Tensor:
        """Log-probability ``[N]`` float32 of each label ``[N]``, computed ``chunk_rows`` rows at a time."""
        ...


class LoadedTeacher(Protocol):
    """A teacher that is ready to answer."""

    def rows(self, sequences: Sequences) -> TeacherRows:
        """The rows of all targets of ``sequences``; called once per micro-batch, and only if an objective needs them."""
        ...


@dataclass(frozen=True)
class Opening:
    """What a teacher is opened with."""

    tokenizer: PreTrainedTokenizerBase
    """The student's."""
    student: ModelSpec
    student_rows: int
    """Rows of the student's LM head."""
    device_type: str
    sharding: Sharding | None = None
    """How models are sharded over the ranks, all of which open the teacher; None loads them whole."""
    padding_free: bool = True
    """Whether models may get several texts in one row."""


class Teacher(ABC):
    """A teacher as it is configured: ``class_path`` and ``init_args`` under ``model.teacher``.

    Args of a subclass are its YAML. Its constructor reads no files.
    """

    accuracy: Accuracy = "exact"
    """What its logits are; objectives say which they accept."""
    answers_generated: bool = True
    """Whether it answers for texts that the run generates; a cache does not."""

    @property
    def parts(self) -> Mapping[str, Teacher]:
        """The teachers that it consists of, by their key below its own."""
        return {}

    @property
    def fields(self) -> frozenset[str]:
        """Fields of the records that it needs; the data module adds them to the items of every text."""
        return frozenset().union(*(part.fields for part in self.parts.values()))

    def check(self, data: Any) -> None:  # noqa: B027 - most accept any
        """Reject a data module that lacks what the teacher needs, before anything loads.

        Raises:
            ValueError: beginning with the argument.
        """

    @abstractmethod
    def open(self, opening: Opening, key: str) -> int | None:
        """Read what is needed to know its vocabulary, but no weights.

        Args:
            opening: student and device.
            key: the teacher's YAML key below ``model``, for messages.

        Returns:
            The number of ids, counted from 0, that it shares with the student; None if it answers for all of the student's.

        Raises:
            ValueError: naming the key, if it cannot be opened, or does not fit the student.
        """

    @abstractmethod
    def load(self, vocabulary_size: int | None, student: CausalLM) -> LoadedTeacher:
        """Load it, after `open`.

        Args:
            vocabulary_size: V, the number of ids, counted from 0, that all models of the run share; None if only the student's
                limit it.
            student: the student, loaded.
        """

    @abstractmethod
    def identity(self, key: str) -> dict[str, Any]:
        """Plain values that identify it, to be compared when a run is resumed."""

    @property
    @abstractmethod
    def description(self) -> str:
        """One line for logs and reports, such as the path of a model."""


def walk(teacher: Teacher, key: str = "teacher") -> Iterator[tuple[str, Teacher]]:
    """A teacher and all of its parts, each with its YAML key below ``model``."""
    yield key, teacher
    for name, part in teacher.parts.items():
        yield from walk(part, f"{key}.init_args.{name}")


def smallest(sizes: Sequence[int | None]) -> int | None:
    """The smallest of the vocabulary sizes that are not None."""
    return min((size for size in sizes if size is not None), default=None)
