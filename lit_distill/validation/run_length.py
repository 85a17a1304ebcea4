"""Computes the length of a run and the batch of its first validation, before any weights load."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_distill.types import ArgumentError

if TYPE_CHECKING:
    from lit_distill.sources import Source


class RunLength(NamedTuple):
    """The length of a run; infinite if no number of steps or epochs ends it."""

    batches_per_epoch: int
    batches: float
    """Batches of the whole run."""
    steps: float
    """Optimiser steps of the whole run."""
    first_validation: float
    """The batch, counted from 1 over all epochs, after which the first validation runs; infinite if none does."""

    @property
    def first_epoch_end(self) -> float:
        """The batch after which the first epoch ends, completed or cut off by the end of the run."""
        return min(self.batches_per_epoch, self.batches)

    @property
    def validates(self) -> bool:
        """Whether a validation runs before the end."""
        return self.first_validation <= self.batches


def has_validation(trainer: Any) -> bool:
    """Whether there is validation data and the Trainer validates."""
    return bool(trainer.limit_val_batches) and getattr(trainer.datamodule, "has_validation", True)


def run_length(trainer: Any, source: Source) -> RunLength | None:
    """The length of a run; None if the data module does not tell its number of items (``num_items``, ``batch_size``)."""
    data = trainer.datamodule
    if not hasattr(data, "num_items") or not hasattr(data, "batch_size"):
        return None
    batches_per_epoch = getattr(data, "batches_per_epoch", lambda: data.num_items("train") // data.batch_size)
    per_epoch = max(1, batches_per_epoch())  # fewer items than a batch are one batch
    limit = trainer.limit_train_batches
    per_epoch = min(per_epoch, limit) if isinstance(limit, int) else max(1, int(per_epoch * limit))
    steps_per_batch = source.steps_per_batch(data.batch_size)
    if steps_per_batch < 1:
        name = type(source).__name__
        raise ArgumentError(
            source, f"{name}: steps_per_batch({data.batch_size}) is {steps_per_batch}, expected at least 1."
        )
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    max_steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
    batches = min(epochs * per_epoch, -(-max_steps // steps_per_batch))
    return RunLength(
        per_epoch, batches, min(batches * steps_per_batch, max_steps), _first_validation(trainer, per_epoch)
    )


def _first_validation(trainer: Any, per_epoch: int) -> float:
    every, epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if not has_validation(trainer):
        return math.inf
    if epochs is None:
        return float(every)
    within = every if isinstance(every, int) else max(1, int(per_epoch * every))
    return math.inf if within > per_epoch else (epochs - 1) * per_epoch + within
