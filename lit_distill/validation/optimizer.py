"""Runs one step of optimiser and scheduler on a tiny model, so that errors in their arguments show before the weights load."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lit_distill.optim import check_total_steps, parameter_groups

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

KEY = "model.optimizer"
SCHEDULER_KEY = "model.lr_scheduler"


def check_optimizer(
    optimizer_of: Any,
    scheduler_of: Any,
    *,
    device: torch.device | str = "cpu",
    vectors: bool = True,
    steps: float | None = None,
) -> None:
    """Create optimiser and scheduler for a matrix and a vector, and run one step of both.

    Args:
        optimizer_of: creates the optimiser from parameter groups.
        scheduler_of: creates the scheduler from the optimiser; None for no scheduler.
        device: the device of the training.
        vectors: whether vectors such as biases are trained too; LoRA adapters are matrices only.
        steps: optimiser steps of the run, if known.

    Raises:
        ValueError: with the key and the original message.
    """
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        shapes = [(2, 2), (2,)] if vectors else [(2, 2)]
        parameters = [nn.Parameter(torch.full(shape, 0.5, device=device)) for shape in shapes]
        optimizer = _create(optimizer_of, parameter_groups(parameters), KEY)
        _check_rates(optimizer)
        scheduler = None if scheduler_of is None else _create(scheduler_of, optimizer, SCHEDULER_KEY)
        if scheduler is not None:
            _check_length(scheduler, steps)
        _step(optimizer, parameters)
        if scheduler is not None:
            _run_step(scheduler, SCHEDULER_KEY, scheduler.step)


def _check_length(scheduler: LRScheduler, steps: float | None) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            f"{SCHEDULER_KEY}: ReduceLROnPlateau needs a metric, but the schedule moves at every optimiser step. Use "
            "WarmupCosine, WarmupConstant or another one of torch.optim.lr_scheduler."
        )
    if steps is None:
        return
    check_total_steps(scheduler, steps)
    if math.isinf(steps) and getattr(scheduler, "total_steps", 0) is None:
        raise ValueError(
            f"{SCHEDULER_KEY}.total_steps: {type(scheduler).__name__} needs the length of the run, but no number of steps or "
            "epochs ends it. Give total_steps, trainer.max_steps or trainer.max_epochs."
        )


def _create(factory: Any, argument: Any, key: str) -> Any:
    try:
        return factory(argument)
    except Exception as error:  # of any type: the class is the user's
        reason = str(error).rstrip(".") or f"{type(error).__name__} without a message"
        raise ValueError(reason if reason.startswith(key) else f"{key}: {reason}. Correct its init_args.") from error


def _check_rates(optimizer: Optimizer) -> None:
    rates = [float(group["lr"]) for group in optimizer.param_groups if group.get("lr") is not None]
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise ValueError(f"{KEY}: lr: expected a finite number >= 0, got {rates[0]}.")


def _step(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.1)
    step: Any = optimizer.step
    _run_step(optimizer, KEY, lambda: step(closure=lambda: None))  # as Lightning calls it
    if not all(parameter.isfinite().all() for parameter in parameters):
        raise ValueError(f"{KEY}: {type(optimizer).__name__} makes weights NaN or infinite at its first step.")


def _run_step(part: Any, key: str, step: Any) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first step of the run shows them again
            step()
    except Exception as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise ValueError(
            f"{key}: {type(part).__name__} fails at its first step: {reason}. Correct its init_args, or use another class."
        ) from error
