"""What saving and resuming need of a run in addition to its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from lit_distill.validation.run import DistillationRun

if TYPE_CHECKING:
    from lit_distill.models import CausalLM
    from lit_distill.resume.unfinished import UnfinishedPhase
    from lit_distill.sources import TargetFilter


class ResumableRun(DistillationRun, Protocol):
    """A module that is being trained."""

    student: CausalLM
    targets: TargetFilter | None
    unfinished: UnfinishedPhase | None
    optimizer_since: int

    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The weights that a checkpoint holds."""
        ...
