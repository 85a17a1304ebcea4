"""Parameter groups, learning-rate schedules with warm-up (YAML: `model.lr_scheduler`), and the check for non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from lit_distill.distributed import data_ranks, gradient_norm, local_part


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Group the trainable parameters: matrices get the optimiser's weight decay, norms and biases get none."""
    trained = [p for p in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def configure_optimizer(
    optimizer_of: Callable[[Any], Optimizer],
    scheduler_of: Callable[[Optimizer], LRScheduler] | None,
    parameters: Iterable[nn.Parameter],
    total_steps: Callable[[], int],
    scales_gradients: bool = False,
) -> Any:
    """What Lightning's ``configure_optimizers`` returns: the optimiser and, if there is one, a scheduler that moves at every step.

    Args:
        optimizer_of: creates the optimiser from parameter groups.
        scheduler_of: creates the scheduler from the optimiser.
        parameters: all parameters of the module.
        total_steps: called for a scheduler whose ``total_steps`` is None.
        scales_gradients: whether the Trainer scales the loss (16-mixed). It cannot clip the gradients of a fused optimiser.
    """
    optimizer = optimizer_of(parameter_groups(parameters))
    if not scales_gradients:
        use_fused_step(optimizer)
    if scheduler_of is None:
        return optimizer
    scheduler = scheduler_of(optimizer)
    if isinstance(scheduler, OneCycleLR):
        check_total_steps(scheduler, total_steps())
    if getattr(scheduler, "total_steps", 0) is None:
        scheduler.total_steps = total_steps()  # type: ignore[attr-defined]
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def use_fused_step(optimizer: Optimizer) -> None:
    """Let Adam and AdamW update a weight in one pass, if neither ``fused`` nor ``foreach`` is given and the devices allow it.

    PyTorch does so only on request. On a CPU with two cores, a step of 55 million weights takes a sixth of the time.
    """
    if type(optimizer) not in (Adam, AdamW):
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not all(p.is_floating_point() and p.device.type in FUSED_DEVICES for p in parameters):
        return
    for group in optimizer.param_groups:
        if group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
            group["fused"] = True


def learning_rate(optimizer: Optimizer) -> dict[str, Tensor]:
    """The learning rate of the first group as metric ``learning_rate``, ``[]``; empty if each weight has its own (Adafactor)."""
    rate = optimizer.param_groups[0].get("lr")
    return {} if rate is None else {"learning_rate": torch.tensor(rate)}


def check_total_steps(scheduler: LRScheduler, steps: float) -> None:
    """Refuse a scheduler that would raise an error before the end of the run.

    Args:
        scheduler: the scheduler of the run.
        steps: optimiser steps of the run.

    Raises:
        ValueError: with the key and both numbers.
    """
    if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < steps:
        end = f"has {steps:.0f}" if math.isfinite(steps) else "has no end"
        raise ValueError(
            f"lr_scheduler.total_steps: OneCycleLR ends after {scheduler.total_steps} optimiser steps, and the run {end}. "
            "Give the steps of the whole run, or use WarmupCosine, which takes this number from the run."
        )


class WarmupConstant(LambdaLR):
    """Linear warm-up to the optimiser's learning rate, then constant.

    Args:
        optimizer: whose learning rates are scaled.
        warmup_steps: optimiser steps until the full rate, >= 0.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected 0 or more, got {warmup_steps}.")
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """The factor of the full learning rate at ``step``."""
        return min(1.0, (step + 1) / (self.warmup_steps + 1))


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine down to a fraction of the optimiser's learning rate.

    Args:
        optimizer: whose learning rates are scaled.
        warmup_steps: optimiser steps until the full rate, >= 0.
        total_steps: optimiser steps until the end of the cosine; by default those of the whole run.
        final_ratio: final learning rate divided by the full one, in [0, 1].
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 0, total_steps: int | None = None, final_ratio: float = 0.0
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected 0 or more, got {warmup_steps}.")
        if not 0 <= final_ratio <= 1:
            raise ValueError(f"final_ratio: expected a number in [0, 1], got {final_ratio}.")
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.final_ratio = final_ratio
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """The factor of the full learning rate at ``step``."""
        if step < self.warmup_steps or self.total_steps is None:
            return min(1.0, (step + 1) / (self.warmup_steps + 1))
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


FUSED_DEVICES = ("cpu", "cuda")
"""Device types for which Adam has a fused step."""
MAX_SKIPPED_IN_A_ROW = 10
"""A run that skips steps stops after this many skipped steps in a row: it does not recover."""
MAX_LISTED_IDS = 20


class DivergedError(ValueError):
    """The run has diverged: its weights are useless, and an earlier checkpoint is better."""


class PendingCheck(NamedTuple):
    """An optimiser step whose gradient has not been checked yet."""

    step: int
    ids: tuple[str, ...]
    """Items of its batch on this rank."""
    bad: Tensor
    """[] bool on the device: whether the gradient was not finite."""


class NonFiniteGradientGuard:
    """Detects non-finite gradients before the optimiser step, and stops the run or skips the step.

    Args:
        action: "stop" ends the run with an error that lists the items of the batch; "skip" leaves the step out, warns once and
            counts such steps.

    Raises:
        ValueError: with the key ``model.on_nonfinite``, if it is neither.
    """

    def __init__(self, action: Literal["stop", "skip"]) -> None:
        if action not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite: expected stop or skip, got {action!r}.")
        self.action = action
        self.ids: tuple[str, ...] = ()
        """Items of the current training batch on this rank."""
        self.skipped = 0
        self._in_a_row = 0
        self._pending: list[PendingCheck] = []

    def mask(self, parameters: Iterable[Tensor], step: int) -> None:
        """Remove all gradients, on all ranks, if any of them is not finite: set to zero for "stop", to None for "skip".

        With None an optimiser changes nothing; with zeros, momentum and weight decay would still change the weights.
        """
        with_gradient = [p for p in parameters if p.grad is not None]
        if not with_gradient:
            return
        bad = ~torch.isfinite(gradient_norm([p.grad for p in with_gradient if p.grad is not None]))
        self._pending.append(PendingCheck(step, self.ids, bad))
        if self.action == "stop":
            for parameter in with_gradient:
                assert parameter.grad is not None
                local_part(parameter.grad).masked_fill_(bad.to(parameter.grad.device), 0.0)
        elif bad:
            for parameter in with_gradient:
                parameter.grad = None

    def check(self, trainer: Any, loss: Tensor | None = None) -> None:
        """Read the results of all steps since the last call.

        It waits for the device, so it is not called at every step.

        Raises:
            DivergedError: with the items of the batch on all ranks, if the run has to stop.
        """
        pending, self._pending = self._pending, []
        bad = torch.stack([entry.bad for entry in pending]).tolist() if pending else []
        steps = [entry for entry, is_bad in zip(pending, bad, strict=True) if is_bad]
        self._in_a_row = self._in_a_row + len(steps) if len(steps) == len(pending) else len(steps)
        self.skipped += len(steps)
        if loss is not None and not math.isfinite(value := float(loss)) and (self.action == "stop" or not steps):
            raise DivergedError(self._message(trainer, f"train/loss is {value}", trainer.global_step, self.ids))
        if steps and (self.action == "stop" or self._in_a_row >= MAX_SKIPPED_IN_A_ROW):
            what = "the gradient is not finite"
            if self.action == "skip":
                what = f"the last {self._in_a_row} gradients are not finite; now"
            raise DivergedError(self._message(trainer, what, steps[0].step, steps[0].ids))
        if steps and self.skipped == len(steps):
            rank_zero_warn(
                f"model.on_nonfinite: skip: the gradient of step {steps[0].step} is not finite, so the step was skipped; "
                "train/skipped_steps counts such steps."
            )

    def metrics(self) -> dict[str, Tensor]:
        """The number of skipped steps; empty while it is 0."""
        return {"train/skipped_steps": torch.tensor(float(self.skipped))} if self.skipped else {}

    def _message(self, trainer: Any, what: str, step: int, own: tuple[str, ...]) -> str:
        items: list[Any] = [own]
        if trainer.world_size > 1:
            ranks = data_ranks(trainer)
            items = [None] * ranks.number
            dist.all_gather_object(items, own, ranks.group)
        ids = [item for share in items for item in share]
        more = f" and {len(ids) - MAX_LISTED_IDS} more" if len(ids) > MAX_LISTED_IDS else ""
        return (
            f"{what} at step {step}: the run has diverged. Lower model.optimizer.lr, set trainer.gradient_clip_val: 1.0, or look "
            "for broken items in the data; earlier checkpoints are from before that step. "
            f"The batch was {', '.join(ids[:MAX_LISTED_IDS])}{more}. To go on without such steps: model.on_nonfinite: skip."
        )
