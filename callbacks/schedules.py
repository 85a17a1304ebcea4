"""Schedules for the teacher's share in rollouts and for the weights of objectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_distill.functional import cosine_schedule, linear_schedule, stepwise_schedule
from lit_distill.sources import TeacherMixedRollouts
from lit_distill.types import ArgumentError, arguments_of, check_sizes

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule
    from lit_distill.types import Trajectories

Shape = Literal["constant", "linear", "cosine", "stepwise"]


class Schedule:
    """A value as a function of the optimiser step.

    Args:
        shape: constant, linear, cosine or stepwise.
        start: the value at step 0.
        end: the value after ``steps``; for linear and cosine.
        steps: optimiser steps from start to end; the whole run's ``trainer.max_steps`` by default.
        values: for stepwise: maps a step to the value from that step on.
    """

    def __init__(
        self,
        shape: Shape,
        start: float,
        end: float | None,
        steps: int | None,
        values: Mapping[int, float] | None,
    ) -> None:
        if (shape in ("linear", "cosine")) != (end is not None):
            raise ValueError(f"end: {end} with shape {shape}. Linear and cosine need it, the others do not accept it.")
        if (shape == "stepwise") != bool(values):
            raise ValueError(f"values: {values} with shape {shape}. Only stepwise needs it, such as {{500: 0.1}}.")
        check_sizes(steps=steps)
        self.shape = shape
        self.start = start
        self.end = end
        self.steps = steps
        self.stepped = dict(values or {})

    def check_range(self, low: float, high: float) -> None:
        """Refuse a schedule with values outside [low, high]."""
        given = [("start", self.start), ("end", self.end), *(("values", value) for value in self.stepped.values())]
        for name, value in given:
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}: expected values in [{low}, {high}], got {value}.")

    def resolve(self, trainer: Trainer) -> None:
        """Use the length of the run if ``steps`` was not given."""
        if self.end is not None and self.steps is None:
            if trainer.max_steps < 1:
                raise ValueError("steps: neither steps nor trainer.max_steps is set. Set one of the two.")
            self.steps = trainer.max_steps

    def __call__(self, step: int) -> float:
        """The value at ``step``."""
        if self.shape == "stepwise":
            return stepwise_schedule(step, self.start, self.stepped)
        if self.end is None:
            return self.start
        assert self.steps is not None
        curve = linear_schedule if self.shape == "linear" else cosine_schedule
        return curve(step, self.start, self.end, self.steps)


class TeacherMixSchedule(Callback):
    """Sets α, the teacher's share in `TeacherMixedRollouts`, before every phase, and logs it as ``rollout/alpha``.

    Args:
        shape: constant, linear, cosine, stepwise, or adaptive, which keeps the reverse KL of rollouts near ``target``.
        start: α at step 0.
        end: α after ``steps``; for linear and cosine.
        steps: optimiser steps from start to end; ``trainer.max_steps`` by default.
        values: for stepwise: maps a step to α from that step on.
        target: for adaptive: the desired reverse KL, nats per token. Above it α increases, below it α decreases.
        rate: for adaptive: the change of α after a phase whose reverse KL is twice the target.
    """

    def __init__(
        self,
        shape: Literal["constant", "linear", "cosine", "stepwise", "adaptive"] = "constant",
        start: float = 0.2,
        end: float | None = None,
        steps: int | None = None,
        values: dict[int, float] | None = None,
        target: float | None = None,
        rate: float = 0.05,
    ) -> None:
        if (shape == "adaptive") != (target is not None) or (target is not None and not target > 0):
            raise ValueError(f"target: {target} with shape {shape}. Adaptive needs one > 0.")
        if not rate > 0:
            raise ValueError(f"rate: expected a number > 0, got {rate}.")
        fixed: Shape = "constant" if shape == "adaptive" else shape
        self.schedule = Schedule(fixed, start, end, steps, values)
        self.schedule.check_range(0.0, 1.0)
        self.target = target
        self.rate = rate
        self.alpha = start

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Refuse a source other than `TeacherMixedRollouts`."""
        if not isinstance(pl_module.source, TeacherMixedRollouts):
            raise ArgumentError(
                self,
                f"TeacherMixSchedule: the source {type(pl_module.source).__name__} does not mix in the teacher. "
                "Set model.source: TeacherMixedRollouts, or remove the callback.",
            )
        if stage == "fit":
            with arguments_of(self):
                self.schedule.resolve(trainer)

    def metric_names(self, trainer: Trainer, pl_module: DistillationModule) -> list[str]:
        """Names of the logged metrics; does not need the weights."""
        return ["rollout/alpha"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: DistillationModule, batch: Any, batch_idx: int) -> None:
        """Set α for the next phase."""
        if self.target is None:
            self.alpha = self.schedule(pl_module.global_step)
        assert isinstance(pl_module.source, TeacherMixedRollouts)
        pl_module.source.alpha = self.alpha

    def on_rollouts(self, trainer: Trainer, pl_module: DistillationModule, trajectories: Trajectories) -> None:
        """Log α, and adapt it for the next phase."""
        pl_module.log_step_metrics({"rollout/alpha": torch.tensor(self.alpha)})
        if self.target is not None:
            mask, signals = trajectories.responses.mask, trajectories.signals
            gap = ((signals["old_logprobs"] - signals["teacher_logprobs"]) * mask).sum()
            total, count = pl_module.sum_over_ranks(torch.stack([gap, mask.sum()]).double()).tolist()
            self.alpha += self.rate * (total / max(count, 1) / self.target - 1)
            self.alpha = min(1.0, max(0.0, self.alpha))

    def state_dict(self) -> dict[str, Any]:
        """The current α, which is needed if it is adaptive."""
        return {"alpha": self.alpha}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore α."""
        self.alpha = state_dict["alpha"]


class ObjectiveWeightSchedule(Callback):
    """Sets an objective's weight before every batch, and logs it as ``train/<objective>/weight``.

    Args:
        objective: its name in ``model.objectives`` or ``model.corpus_objectives``.
        shape: constant, linear, cosine or stepwise.
        start: the weight at step 0.
        end: the weight after ``steps``; for linear and cosine.
        steps: optimiser steps from start to end; ``trainer.max_steps`` by default.
        values: for stepwise: maps a step to the weight from that step on.
    """

    def __init__(
        self,
        objective: str,
        shape: Shape = "linear",
        start: float = 1.0,
        end: float | None = None,
        steps: int | None = None,
        values: dict[int, float] | None = None,
    ) -> None:
        self.objective = objective
        self.schedule = Schedule(shape, start, end, steps, values)
        self.schedule.check_range(0.0, float("inf"))

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Refuse the name of an objective that the run does not have."""
        known = pl_module.all_objectives
        if self.objective not in known:
            raise ArgumentError(
                self, f"objective: there is no objective {self.objective!r}. Give one of: {', '.join(known)}."
            )
        if stage == "fit":
            with arguments_of(self):
                self.schedule.resolve(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Warn of checkpoints that are chosen by a loss whose weights change."""
        watches = any(getattr(callback, "monitor", None) == "val/loss" for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if watches and self.schedule.shape != "constant" and self.objective in pl_module.token_metrics.trained:
            rank_zero_warn(
                f"val/loss changes with the weight of {self.objective!r}, so its values at different steps cannot be compared, but "
                "a callback watches it. Set checkpoint.monitor, or that of the callback, to another metric, such as val/perplexity."
            )

    def metric_names(self, trainer: Trainer, pl_module: DistillationModule) -> list[str]:
        """Names of the logged metrics; does not need the weights."""
        return [f"train/{self.objective}/weight"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: DistillationModule, batch: Any, batch_idx: int) -> None:
        """Set the weight for the steps of this batch."""
        weight = self.schedule(pl_module.global_step)
        pl_module.all_objectives[self.objective].weight = weight
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = every > 0 and pl_module.global_step % every == 0
        pl_module.log_step_metrics({f"train/{self.objective}/weight": torch.tensor(weight)}, write=due)
