"""The student as its own teacher, as it was a while ago: a copy of its weights that follows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lit_distill.models.build import ModelBuilder
from lit_distill.teachers.base import Opening, Teacher
from lit_distill.teachers.local import FrozenTeacher
from lit_distill.types import check_sizes

if TYPE_CHECKING:
    from lit_distill.models import CausalLM


class StudentTeacher(Teacher):
    """A copy of the student: an exponential moving average of its weights, or the weights of every n-th step.

    The copy is saved in checkpoints, so that a resumed run goes on exactly.

    Args:
        decay: the copy becomes decay · copy + (1 − decay) · student at each update; 0 copies the student.
        every_n_steps: optimiser steps between two updates.
    """

    def __init__(self, decay: float = 0.0, every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay}.")
        check_sizes(every_n_steps=every_n_steps)
        self.decay = decay
        self.every_n_steps = every_n_steps
        self._builder: ModelBuilder | None = None
        self._padding_free = True
        self._lm: CausalLM | None = None

    def open(self, opening: Opening, key: str) -> int | None:
        """Build a second model like the student."""
        if opening.student.lora is not None:
            raise ValueError(
                f"{key}: StudentTeacher copies whole models, but the student has adapters. Set model.{key}.path to the student's, "
                "and shared_with_student: true, for the base without adapters."
            )
        if opening.sharding is not None:
            raise ValueError(f"{key}: StudentTeacher is not sharded. Set trainer.strategy: ddp, or auto.")
        self._builder = ModelBuilder(opening.student, key, torch.float32, None)
        self._padding_free = opening.padding_free
        return None

    def load(self, vocabulary_size: int | None, student: CausalLM | None) -> FrozenTeacher:
        """Copy the student's weights."""
        assert self._builder is not None
        assert student is not None
        self._lm = self._builder.finish(vocabulary_size, self._padding_free, frozen=True)
        self._builder = None
        self._follow(student, decay=0.0)
        return FrozenTeacher(self._lm)

    def after_step(self, student: CausalLM, step: int) -> None:
        """Update the copy if it is due."""
        if step % self.every_n_steps == 0:
            self._follow(student, self.decay)

    @torch.no_grad()
    def _follow(self, student: CausalLM, decay: float) -> None:
        assert self._lm is not None
        for mine, theirs in zip(self._lm.parameters(), student.parameters(), strict=True):
            mine.lerp_(theirs.detach().to(mine.device, mine.dtype), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """The weights of the copy."""
        return {} if self._lm is None else {"weights": self._lm.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the copy."""
        if self._lm is not None and "weights" in state:
            self._lm.load_state_dict(state["weights"])

    def identity(self, key: str) -> dict[str, Any]:
        """It has no weights of its own: they are in the checkpoint."""
        return {"path": self.description, "revision": None, "layers": [None, None], "content": None}

    @property
    def description(self) -> str:
        """How it follows the student."""
        return f"the student itself (decay {self.decay}, every {self.every_n_steps} steps)"
