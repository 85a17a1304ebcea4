"""The interfaces of teachers: what YAML configures, what a run then asks, and what it gets for the target positions of texts.

A teacher is configured as a `Teacher`, before anything is read. `Teacher.open` then reads what is small, `Teacher.load` the rest;
it returns the `LoadedTeacher` that answers. A teacher may have others as its parts, of any kind.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from lit_distill.functional.host import to_device
from lit_distill.objectives import Accuracy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_distill.distributed import Sharding
    from lit_distill.models import CausalLM, ModelSpec
    from lit_distill.types import Sequences


T = TypeVar("T")


class TeacherRows(Protocol):
    """A teacher's predictions at N target positions, in the order of the targets."""

    def logits(self, rows: slice) -> Tensor:
        """Logits ``[n, V]`` float32 of the selected rows, over the common vocabulary, without gradient."""
        ...

    def label_logprobs(self, labels: Tensor, chunk_rows: int | None = None) -> Tensor:
        """Log-probability ``[N]`` float32 of each label ``[N]``, computed ``chunk_rows`` rows at a time."""
        ...


class RowsPart(NamedTuple):
    """Some of the N target positions, with the predictions of one teacher for them."""

    name: str | None
    """The teacher's name, under which the terms of objectives are reported; None for the only one."""
    places: Tensor
    """[M] int64 on the CPU, ascending: which of the N targets."""
    rows: TeacherRows | None
    """Of these M targets; None if there are none."""
    tokens: Tensor | None = None
    """[S] int64 on the device of the texts, ascending: the student's ids that its logits are about; None: all V."""


class PartedRows:
    """Predictions of several teachers, or of one that does not answer for every target or token.

    Args:
        parts: without a target in common.
        num_rows: N.
    """

    def __init__(self, parts: Sequence[RowsPart], num_rows: int) -> None:
        self.parts = [flat for part in parts for flat in _flattened(part)]
        self.num_rows = num_rows

    def logits(self, rows: slice) -> Tensor:
        """See `TeacherRows`.

        Raises:
            ValueError: if one of the targets or tokens has no teacher.
        """
        self._check_whole()
        pieces, places = [], []
        for part in self.parts:
            local, inside = part_of(part, rows)
            if part.rows is not None and len(inside):
                pieces.append(part.rows.logits(local))
                places.append(inside)
        joined = torch.cat(pieces)
        order = to_device(torch.cat(places).argsort(), joined.device)
        return joined[order]

    def label_logprobs(self, labels: Tensor, chunk_rows: int | None = None) -> Tensor:
        """See `TeacherRows`.

        Raises:
            ValueError: if one of the targets or tokens has no teacher.
        """
        self._check_whole()
        scores = labels.new_zeros(len(labels), dtype=torch.float32)
        for part in self.parts:
            if part.rows is not None and len(part.places):
                index = to_device(part.places, labels.device)
                scores[index] = part.rows.label_logprobs(labels[index], chunk_rows)
        return scores

    def _check_whole(self) -> None:
        if sum(len(part.places) for part in self.parts) < self.num_rows or any(
            part.tokens is not None for part in self.parts
        ):
            raise ValueError(
                "teacher: it does not answer for every token of these texts, which this objective or source needs. Use objectives "
                "on single tokens, such as ForwardKL, and source: DatasetResponses or StudentRollouts."
            )


def part_of(part: RowsPart, rows: slice) -> tuple[slice, Tensor]:
    """Which of a part's rows lie in a slice of all rows: as a slice of the part, and their places inside ``rows``."""
    edges = torch.tensor([rows.start, rows.stop])
    first, last = torch.searchsorted(part.places, edges).tolist()
    return slice(first, last), part.places[first:last] - rows.start


def _flattened(part: RowsPart) -> Iterator[RowsPart]:
    if not isinstance(part.rows, PartedRows):
        yield part
        return
    for inner in part.rows.parts:
        yield RowsPart(part.name or inner.name, part.places[inner.places], inner.rows, inner.tokens)


class LoadedTeacher(Protocol):
    """A teacher that is ready to answer. It may have the methods of `Prefetching` and `Partial` too."""

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
    answers_all: bool = True
    """Whether it answers for every target and token; an aligned teacher does not."""
    answers_generated: bool = True
    """Whether it answers for texts that the run generates; a cache does not."""

    @property
    def knows_all_probabilities(self) -> bool:
        """Whether every token has a probability at every target, so that divergences in both directions are finite."""
        return self.answers_all and self.accuracy in ("exact", "spread")

    @property
    def known_tokens(self) -> int | None:
        """Number of tokens of each target whose probability it knows: its most probable ones; None: all."""
        known = [number for part in self.parts.values() if (number := part.known_tokens) is not None]
        return min(known, default=None)

    @property
    def parts(self) -> Mapping[str, Teacher]:
        """The teachers that it consists of, by their key below its own."""
        return {}

    @property
    def fields(self) -> frozenset[str]:
        """Fields of the records that it needs; the data module adds them to the items of every text."""
        return frozenset().union(*(part.fields for part in self.parts.values()))

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
    def load(self, vocabulary_size: int | None, student: CausalLM | None) -> LoadedTeacher:
        """Load it, after `open`.

        Args:
            vocabulary_size: V, the number of ids, counted from 0, that all models of the run share; None if only the student's
                limit it.
            student: the student, loaded; None if the run has none.
        """

    def after_step(self, student: CausalLM, step: int) -> None:
        """Called after every optimiser step, for teachers that follow the student."""
        for part in self.parts.values():
            part.after_step(student, step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as tensors and plain values; equal on all ranks."""
        return {name: state for name, part in self.parts.items() if (state := part.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, part in self.parts.items():
            if name in state:
                part.load_state_dict(state[name])

    def close(self) -> None:
        """Release what it holds open; called at the end of a run."""
        for part in self.parts.values():
            part.close()

    @abstractmethod
    def identity(self, key: str) -> dict[str, Any]:
        """Plain values that identify it, to be compared when a run is resumed."""

    @property
    @abstractmethod
    def description(self) -> str:
        """One line for logs and reports, such as the path of a model."""


@runtime_checkable
class Prefetching(LoadedTeacher, Protocol):
    """A loaded teacher that can begin to answer while something else is computed."""

    def prefetch(self, sequences: Sequences) -> None:
        """Begin to answer for texts for which `LoadedTeacher.rows` will be called."""
        ...


@runtime_checkable
class Partial(LoadedTeacher, Protocol):
    """A loaded teacher that does not answer for every target."""

    def num_answered(self, sequences: Sequences) -> int:
        """The number of targets that it answers for."""
        ...


class Prepared(Generic[T]):
    """What a teacher computes of texts ahead of `LoadedTeacher.rows`, such as their number of answers, and then uses there.

    Args:
        compute: computes it.
    """

    def __init__(self, compute: Callable[[Sequences], T]) -> None:
        self._compute = compute
        self._known: dict[int, tuple[Sequences, T]] = {}  # the texts are kept, so that no others get their id

    def ahead(self, sequences: Sequences) -> T:
        """The result, which is kept until `take`."""
        known = self._known.get(id(sequences))
        if known is None:
            known = self._known[id(sequences)] = sequences, self._compute(sequences)
        return known[1]

    def take(self, sequences: Sequences) -> T:
        """The result, computed now or ahead."""
        known = self._known.pop(id(sequences), None)
        return self._compute(sequences) if known is None else known[1]


def require_items(sequences: Sequences, teacher: Teacher, key: str) -> None:
    """Refuse texts without records.

    Args:
        sequences: the texts.
        teacher: needs a field of their records.
        key: its YAML key below ``model``.

    Raises:
        ValueError: with the key.
    """
    if not sequences.items:
        raise ValueError(
            f"model.{key}: {type(teacher).__name__} needs items with a record, which a corpus does not have. Use it in "
            "model.objectives, not in model.corpus_objectives."
        )


def joined_identity(teacher: Teacher, key: str, **settings: Any) -> dict[str, Any]:
    """The identity of a teacher with parts: a digest of theirs and of its own settings."""
    parts = {name: part.identity(f"{key}.init_args.{name}") for name, part in teacher.parts.items()}
    content = {name: one["content"] or [one["path"], one["revision"]] for name, one in parts.items()}
    code = hashlib.sha256(json.dumps([type(teacher).__name__, content, settings], sort_keys=True).encode()).hexdigest()
    return {"path": teacher.description, "revision": None, "layers": [None, None], "content": code[:32]}


def walk(teacher: Teacher, key: str = "teacher") -> Iterator[tuple[str, Teacher]]:
    """A teacher and all of its parts, each with its YAML key below ``model``."""
    yield key, teacher
    for name, part in teacher.parts.items():
        yield from walk(part, f"{key}.init_args.{name}")


def cached_parts(teacher: Teacher, key: str = "teacher") -> list[str]:
    """The YAML keys below ``model`` of a teacher's parts, or of itself, that do not answer for texts that the run generates."""
    return [name for name, part in walk(teacher, key) if not part.answers_generated]
