"""Checks on loaded weights and on losses: weights of another model, or a loss that is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_distill.distributed.stored import refuse_another_model
from lit_distill.optim import DivergedError


def check_same_model(stored: Mapping[str, Any], here: Mapping[str, Tensor]) -> None:
    """Refuse the weights of another model.

    Args:
        stored: weights of a checkpoint, by name; values that are not tensors are not compared.
        here: the weights that will be overwritten.

    Raises:
        ValueError: with the key ``ckpt_path`` and the first weight that differs.
    """
    sharded = {name for name, value in stored.items() if not isinstance(value, Tensor)}  # compared when they are read
    sizes = {name: tuple(value.shape) for name, value in stored.items() if name not in sharded}
    wanted = {name: tuple(value.shape) for name, value in here.items() if name not in sharded}
    refuse_another_model(sizes, wanted)


def check_finite(loss: Tensor, name: str, step: int) -> None:
    """Stop a run that has diverged.

    Raises:
        DivergedError: if ``loss`` is NaN or infinite.
    """
    if not math.isfinite(value := float(loss)):
        raise DivergedError(
            f"{name} is {value} at step {step}: the run has diverged. Lower model.optimizer.lr, set "
            "trainer.gradient_clip_val: 1.0, or look for broken items in the data; earlier checkpoints are still good."
        )
