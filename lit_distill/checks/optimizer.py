"""An optimiser and its scheduler take one step of a tiny model, since what is wrong with them would show after loading."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lit_distill.schedulers import KEY as SCHEDULER_KEY
from lit_distill.schedulers import check_total_steps, parameter_groups

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

KEY = "model.optimizer"


def check_optimizer(
    optimizer_of: Any,
    scheduler_of: Any,
    *,
    device: torch.device | str = "cpu",
    vectors: bool = True,
    steps: float | None = None,
) -> None:
    """Make optimiser and scheduler for a matrix and a vector, and let both take a step.

    Args:
        optimizer_of: makes the optimiser of groups of parameters.
        scheduler_of: makes the scheduler of the optimiser; None for none.
        device: on which the run will train.
        vectors: whether vectors are trained too, such as biases; adapters are matrices alone.
        steps: optimiser steps of the run, if they are known.

    Raises:
        ValueError: naming the key, with what they say.
    """
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        shapes = [(2, 2), (2,)] if vectors else [(2, 2)]
        parameters = [nn.Parameter(torch.full(shape, 0.5, device=device)) for shape in shapes]
        optimizer = _made(optimizer_of, parameter_groups(parameters), KEY)
        _check_rates(optimizer)
        scheduler = None if scheduler_of is None else _made(scheduler_of, optimizer, SCHEDULER_KEY)
        if scheduler is not None:
            _check_length(scheduler, steps)
        _step(optimizer, parameters)
        if scheduler is not None:
            _attempt(scheduler, SCHEDULER_KEY, scheduler.step)


def _check_length(scheduler: LRScheduler, steps: float | None) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            f"{SCHEDULER_KEY}: ReduceLROnPlateau waits for a metric, and the schedule moves at every optimiser step. Use "
            "WarmupCosine, WarmupConstant or another one of torch.optim.lr_scheduler."
        )
    if steps is None:
        return
    check_total_steps(scheduler, steps)
    if math.isinf(steps) and getattr(scheduler, "total_steps", 0) is None:
        raise ValueError(
            f"{SCHEDULER_KEY}.total_steps: {type(scheduler).__name__} goes over the whole run, and no number of steps or epochs "
            "ends this one. Give total_steps, trainer.max_steps or trainer.max_epochs."
        )


def _made(factory: Any, argument: Any, key: str) -> Any:
    try:
        return factory(argument)
    except Exception as error:  # of any class: it is the user's choice
        said = str(error).rstrip(".") or f"{type(error).__name__} without a word"
        raise ValueError(said if said.startswith(key) else f"{key}: {said}. Correct its init_args.") from error


def _check_rates(optimizer: Optimizer) -> None:
    rates = [float(group["lr"]) for group in optimizer.param_groups if group.get("lr") is not None]
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise ValueError(f"{KEY}: lr: expected a finite number >= 0, got {rates[0]}.")


def _step(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.1)
    step: Any = optimizer.step
    _attempt(optimizer, KEY, lambda: step(closure=lambda: None))  # as Lightning calls it
    if not all(parameter.isfinite().all() for parameter in parameters):
        raise ValueError(f"{KEY}: {type(optimizer).__name__} makes weights NaN or infinite at its first step.")


def _attempt(taken: Any, key: str, step: Any) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again at the first step of the run
            step()
    except Exception as error:
        said = str(error).rstrip(".") or type(error).__name__
        raise ValueError(
            f"{key}: {type(taken).__name__} fails at its first step: {said}. Correct its init_args, or take another one."
        ) from error
