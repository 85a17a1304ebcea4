"""What is refused: Trainer options that would break a promise, before any weights load, and losses that are no numbers."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor


def check_trainer(trainer: Any) -> None:
    """Look at a Lightning Trainer that is about to fit a `DistillationModule`.

    Raises:
        ValueError: naming the key, what was given and what to do.
    """
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches: {trainer.accumulate_grad_batches} would average micro-batches of different "
            "lengths. Set data.init_args.batch_size to the items of one optimiser step and model.micro_batch_size to the "
            "texts that fit in memory at once."
        )
    if trainer.precision == "16-mixed":
        raise ValueError("trainer.precision: 16-mixed overflows in the loss of long rows. Use bf16-mixed or 32-true.")
    validates = trainer.limit_val_batches and getattr(trainer.datamodule, "has_validation", True)
    for callback in trainer.callbacks:
        if type(callback) is ModelCheckpoint and callback._every_n_train_steps > 0:
            raise ValueError(
                f"trainer.callbacks: ModelCheckpoint compares the step modulo every_n_train_steps "
                f"({callback._every_n_train_steps}), and a batch of many steps may miss it for ever. Set "
                "checkpoint.every_n_train_steps, or class_path: RunCheckpoint, which saves at the end of such a batch."
            )
        if isinstance(callback, ModelCheckpoint) and (callback.monitor or "").startswith("val/") and not validates:
            raise ValueError(
                f"checkpoint.monitor: {callback.monitor} is watched, and there is no validation. Set "
                "data.init_args.validation or validation_size, or checkpoint.monitor: null."
            )


def check_finite(loss: Tensor, name: str, step: int) -> None:
    """Stop a run that has diverged.

    Raises:
        ValueError: if ``loss`` is NaN or infinite.
    """
    if not math.isfinite(value := float(loss)):
        raise ValueError(
            f"{name} is {value} at step {step}: the run has diverged. Lower model.optimizer.lr, set "
            "trainer.gradient_clip_val: 1.0, or look for broken items in the data; the last checkpoint is still good."
        )
