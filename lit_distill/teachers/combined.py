"""Several teachers in one run: each for its own items, or all of them as one mixture."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_distill.data.rows import STUDENT_PROMPT
from lit_distill.models import ModelSpec
from lit_distill.objectives import Accuracy
from lit_distill.teachers.base import (
    LoadedTeacher,
    Opening,
    PartedRows,
    Partial,
    Prefetching,
    Prepared,
    RowsPart,
    Teacher,
    TeacherRows,
    joined_identity,
    require_items,
)
from lit_distill.teachers.local import as_teacher

if TYPE_CHECKING:
    from lit_distill.models import CausalLM
    from lit_distill.types import Item, Sequences


class _Combined(Teacher):
    """Opens and loads all teachers of a dictionary."""

    def __init__(self, teachers: Mapping[str, Teacher | ModelSpec]) -> None:
        if not teachers:
            raise ValueError("teachers: there are none. Give at least one, by name.")
        self.teachers = {name: as_teacher(teacher) for name, teacher in teachers.items()}
        self.loaded: dict[str, LoadedTeacher] = {}

    @property
    def parts(self) -> Mapping[str, Teacher]:
        """The teachers, by their key."""
        return {f"teachers.{name}": teacher for name, teacher in self.teachers.items()}

    @property
    def answers_generated(self) -> bool:  # type: ignore[override]
        """Whether all of them do."""
        return all(teacher.answers_generated for teacher in self.teachers.values())

    @property
    def answers_all(self) -> bool:  # type: ignore[override]
        """Whether all of them do."""
        return all(teacher.answers_all for teacher in self.teachers.values())

    def open(self, opening: Opening, key: str) -> int | None:
        """The ids that all of them share with the student."""
        sizes = [teacher.open(opening, f"{key}.init_args.{name}") for name, teacher in self.parts.items()]
        return min((size for size in sizes if size is not None), default=None)

    def load(self, vocabulary_size: int | None, student: CausalLM | None) -> LoadedTeacher:
        """Load all of them."""
        self.loaded = {name: teacher.load(vocabulary_size, student) for name, teacher in self.teachers.items()}
        return self

    @abstractmethod
    def rows(self, sequences: Sequences) -> TeacherRows:
        """See `LoadedTeacher`."""

    @property
    def description(self) -> str:
        """All of them, by name."""
        return ", ".join(f"{name}: {teacher.description}" for name, teacher in self.teachers.items())

    def _worst(self) -> Accuracy:
        found = {teacher.accuracy for teacher in self.teachers.values()}
        return next(one for one in ("drawn", "truncated", "spread", "exact") if one in found)


class _Share(NamedTuple):
    """What one of several teachers has of a batch."""

    name: str
    texts: Sequences | None
    """Its texts; None if there are none."""
    places: Tensor
    """[M] int64: which of all targets are theirs."""


class RoutedTeachers(_Combined):
    """Each item has one of several teachers, by a field of its record or by a pattern in its prompt.

    A teacher runs only for its own items. Objectives are reported for each teacher too, as ``train/<objective>/<teacher>``.

    Args:
        teachers: by name; each a local model, or any other teacher.
        column: field of the records with the name of the teacher.
        patterns: instead of ``column``, a regular expression for each teacher, which is searched for in the prompt; the first
            that is found decides.
        default: name of the teacher of all other items; without it, such an item is an error.
    """

    def __init__(
        self,
        teachers: dict[str, Teacher | ModelSpec],
        column: str | None = None,
        patterns: dict[str, str] | None = None,
        default: str | None = None,
    ) -> None:
        super().__init__(teachers)
        if (column is None) == (patterns is None):
            raise ValueError("column: give either column or patterns, which decide on the teacher of an item.")
        for argument, names in (("patterns", patterns or ()), ("default", () if default is None else (default,))):
            for name in names:
                if name not in teachers:
                    raise ValueError(f"{argument}: there is no teacher {name!r}, only {', '.join(teachers)}.")
        if bad := [name for name in teachers if "/" in name or "." in name]:
            raise ValueError(f"teachers: {bad[0]!r} is a name in logs and keys. Use a name without dots and slashes.")
        self.column = column
        try:
            self.patterns = {name: re.compile(pattern) for name, pattern in (patterns or {}).items()}
        except re.error as error:
            raise ValueError(f"patterns: {error.pattern!r} is no regular expression: {error}.") from error
        self.default = default
        self._shares = Prepared(self._split)

    @property
    def fields(self) -> frozenset[str]:
        """The column, or the prompt, and the fields of the teachers."""
        return super().fields | {self.column or STUDENT_PROMPT}

    @property
    def accuracy(self) -> Accuracy:  # type: ignore[override]
        """The least exact of them."""
        return self._worst()

    def teacher_of(self, item: Item) -> str:
        """The name of an item's teacher.

        Raises:
            ValueError: naming the item, if there is none.
        """
        if self.column is not None:
            name = item.fields.get(self.column, "")
            if name in self.teachers:
                return name
            why = f"its field {self.column} is {name!r}"
        else:
            prompt = item.fields.get(STUDENT_PROMPT, "")
            for name, pattern in self.patterns.items():
                if pattern.search(prompt):
                    return name
            why = "no pattern is found in its prompt"
        if self.default is None:
            raise ValueError(
                f"model.teacher.init_args.default: the item {item.id!r} has no teacher: {why}, and the teachers are "
                f"{', '.join(self.teachers)}. Correct it, or set default to one of them."
            )
        return self.default

    def rows(self, sequences: Sequences) -> TeacherRows:
        """The rows of each teacher for its own items."""
        parts = []
        for name, texts, places in self._shares.take(sequences):
            loaded = self.loaded[name]
            rows = None if texts is None else loaded.rows(texts)
            if texts is None and getattr(getattr(loaded, "lm", None), "forward_is_collective", False):
                loaded.rows(sequences.slice(0, 1).without_targets())  # other ranks wait for it
            parts.append(RowsPart(name, places, rows))
        return PartedRows(parts, int(sequences.masks.targets.sum()))

    def prefetch(self, sequences: Sequences) -> None:
        """See `Prefetching`."""
        for name, texts, _ in self._shares.ahead(sequences):
            loaded = self.loaded[name]
            if texts is not None and isinstance(loaded, Prefetching):
                loaded.prefetch(texts)

    def num_answered(self, sequences: Sequences) -> int:
        """See `Partial`."""
        total = 0
        for name, texts, places in self._shares.ahead(sequences):
            loaded = self.loaded[name]
            total += loaded.num_answered(texts) if texts is not None and isinstance(loaded, Partial) else len(places)
        return total

    def _split(self, sequences: Sequences) -> list[_Share]:
        learnt = sequences.masks.targets.sum(dim=1).tolist()
        if any(learnt):
            require_items(sequences, self, "teacher")
        chosen = [self.teacher_of(sequences.items[row]) if count else None for row, count in enumerate(learnt)]
        owner = [name for name, count in zip(chosen, learnt, strict=True) for _ in range(count)]
        shares = []
        for name in self.teachers:
            rows = [row for row, own in enumerate(chosen) if own == name]
            places = torch.tensor([place for place, own in enumerate(owner) if own == name], dtype=torch.int64)
            shares.append(_Share(name, sequences.select(torch.tensor(rows)) if rows else None, places))
        return shares

    def identity(self, key: str) -> dict[str, Any]:
        """That of its teachers, and of how they are chosen."""
        patterns = {name: pattern.pattern for name, pattern in self.patterns.items()}
        return joined_identity(self, key, column=self.column, patterns=patterns, default=self.default)


class MixedTeachers(_Combined):
    """One teacher made of several: the weighted mean of their probabilities.

    Args:
        teachers: by name; each a local model, or any other teacher that answers for every token.
        weights: of every teacher, above 0, with the sum 1; equal by default.
    """

    def __init__(self, teachers: dict[str, Teacher | ModelSpec], weights: dict[str, float] | None = None) -> None:
        super().__init__(teachers)
        weights = weights or dict.fromkeys(teachers, 1 / len(teachers))
        if weights.keys() != teachers.keys():
            raise ValueError(f"weights: expected a weight for each of {', '.join(teachers)}, got {', '.join(weights)}.")
        if min(weights.values()) <= 0 or not math.isclose(sum(weights.values()), 1, abs_tol=1e-6):
            raise ValueError(f"weights: expected numbers above 0 with the sum 1, got {weights}.")
        if partial := [name for name, teacher in self.teachers.items() if not teacher.answers_all]:
            raise ValueError(
                f"teachers.{partial[0]}: it does not answer for every token, so it cannot be a part of a mixture. Use "
                "RoutedTeachers."
            )
        self.weights = weights

    @property
    def known_tokens(self) -> int | None:
        """All, if one of them knows all."""
        known = [number for teacher in self.teachers.values() if (number := teacher.known_tokens) is not None]
        return min(known) if len(known) == len(self.teachers) else None

    @property
    def accuracy(self) -> Accuracy:  # type: ignore[override]
        """Drawn if one of them is; truncated if all are, since others give every token a probability."""
        worst = self._worst()
        everywhere = any(teacher.accuracy in ("exact", "spread") for teacher in self.teachers.values())
        return "spread" if worst == "truncated" and everywhere else worst

    def rows(self, sequences: Sequences) -> TeacherRows:
        """The mixture's rows; every teacher runs."""
        return MixedRows([(self.weights[name], teacher.rows(sequences)) for name, teacher in self.loaded.items()])

    def prefetch(self, sequences: Sequences) -> None:
        """See `Prefetching`."""
        for loaded in self.loaded.values():
            if isinstance(loaded, Prefetching):
                loaded.prefetch(sequences)

    def identity(self, key: str) -> dict[str, Any]:
        """That of its teachers, and their weights."""
        return joined_identity(self, key, weights=self.weights)


class MixedRows:
    """`TeacherRows` of a mixture: log Σ w·p.

    Args:
        rows: weight and rows of each teacher.
    """

    def __init__(self, rows: list[tuple[float, TeacherRows]]) -> None:
        self.rows = rows

    def logits(self, rows: slice) -> Tensor:
        """See `TeacherRows`; one teacher's logits at a time are in memory beside the sum."""
        total: Tensor | None = None
        for weight, teacher in self.rows:
            logits = teacher.logits(rows)
            shift = logits.logsumexp(dim=-1, keepdim=True) - math.log(weight)
            logits = logits - shift
            total = logits if total is None else torch.logaddexp(total, logits)
        assert total is not None
        return total

    def label_logprobs(self, labels: Tensor, chunk_rows: int | None = None) -> Tensor:
        """See `TeacherRows`."""
        scores = [math.log(weight) + teacher.label_logprobs(labels, chunk_rows) for weight, teacher in self.rows]
        return torch.stack(scores).logsumexp(dim=0)
