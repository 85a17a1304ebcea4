"""What an optimiser is given: groups of parameters, and learning-rate schedules with warm-up (YAML: `model.lr_scheduler`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

KEY = "model.lr_scheduler"


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """The parameters that train: matrices with the optimiser's weight decay, norms and biases without."""
    trained = [p for p in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def optimization(
    optimizer_of: Callable[[Any], Optimizer],
    scheduler_of: Callable[[Optimizer], LRScheduler] | None,
    parameters: Iterable[nn.Parameter],
    total_steps: Callable[[], int],
) -> Any:
    """What Lightning's ``configure_optimizers`` returns: the optimiser and, where there is one, a scheduler of its steps.

    Args:
        optimizer_of: makes the optimiser of groups of parameters.
        scheduler_of: makes the scheduler of the optimiser.
        parameters: of the module.
        total_steps: asked for by a scheduler whose ``total_steps`` is None.
    """
    optimizer = optimizer_of(parameter_groups(parameters))
    if scheduler_of is None:
        return optimizer
    scheduler = scheduler_of(optimizer)
    if isinstance(scheduler, OneCycleLR):
        check_total_steps(scheduler, total_steps())
    if getattr(scheduler, "total_steps", 0) is None:
        scheduler.total_steps = total_steps()  # type: ignore[attr-defined]
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def learning_rate(optimizer: Optimizer) -> dict[str, Tensor]:
    """``[]`` that of the first group, by its name; nothing where the optimiser finds one for each weight, as Adafactor may."""
    rate = optimizer.param_groups[0].get("lr")
    return {} if rate is None else {"learning_rate": torch.tensor(rate)}


def check_total_steps(scheduler: LRScheduler, steps: float) -> None:
    """Refuse a scheduler that would raise an error before the end of the run.

    Args:
        scheduler: of the run.
        steps: optimiser steps of the run.

    Raises:
        ValueError: naming the key and both numbers.
    """
    if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < steps:
        end = f"has {steps:.0f}" if math.isfinite(steps) else "has no end"
        raise ValueError(
            f"{KEY}.total_steps: OneCycleLR ends after {scheduler.total_steps} optimiser steps, and the run {end}. "
            "Give the steps of the whole run, or use WarmupCosine, which takes them by itself."
        )


class WarmupConstant(LambdaLR):
    """Linear warm-up to the optimiser's learning rate, which then stays.

    Args:
        optimizer: whose learning rates are scaled.
        warmup_steps: optimiser steps until the full rate, >= 0.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0) -> None:
        if warmup_steps < 0:
            raise ValueError(f"{KEY}.warmup_steps: expected 0 or more, got {warmup_steps}.")
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """Share of the full rate at ``step``."""
        return min(1.0, (step + 1) / (self.warmup_steps + 1))


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine down to a share of the optimiser's learning rate.

    Args:
        optimizer: whose learning rates are scaled.
        warmup_steps: optimiser steps until the full rate, >= 0.
        total_steps: optimiser steps until the end of the cosine; by default those of the whole run.
        final_ratio: what is left at the end, in [0, 1].
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 0, total_steps: int | None = None, final_ratio: float = 0.0
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"{KEY}.warmup_steps: expected 0 or more, got {warmup_steps}.")
        if not 0 <= final_ratio <= 1:
            raise ValueError(f"{KEY}.final_ratio: expected a number in [0, 1], got {final_ratio}.")
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.final_ratio = final_ratio
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """Share of the full rate at ``step``."""
        if step < self.warmup_steps or self.total_steps is None:
            return min(1.0, (step + 1) / (self.warmup_steps + 1))
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
