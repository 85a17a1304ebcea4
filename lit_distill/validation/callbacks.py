"""Callbacks of Lightning that do not work here, each with what to use instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from lightning.pytorch import callbacks as lightning
from lightning.pytorch.callbacks import Callback

_FREEZES = "freezes layers of a model that is not loaded yet. To train only a few weights, set model.student.lora."
_AVERAGES = (
    "copies the teacher too, loads both models before anything is checked, and averages once per batch, which may be many "
    "optimiser steps. Keep checkpoints with checkpoint.save_top_k: -1, and average what tools/export_student.py writes."
)
REFUSED: Mapping[type[Callback], str] = {
    lightning.BackboneFinetuning: _FREEZES,
    lightning.BaseFinetuning: _FREEZES,
    lightning.BatchSizeFinder: (
        "would change how many items one optimiser step sees. Set model.micro_batch_size to the texts that fit in memory at once."
    ),
    lightning.EMAWeightAveraging: _AVERAGES,
    lightning.GradientAccumulationScheduler: (
        "would average micro-batches of different lengths. Set data.init_args.batch_size to the items of one optimiser step and "
        "model.micro_batch_size to the texts that fit in memory at once."
    ),
    lightning.LearningRateFinder: "cannot reach the optimiser. Try some values of model.optimizer.lr in short runs.",
    lightning.ModelPruning: (
        "prunes a model that is not loaded yet. Set model.student.keep_layers or drop_layers, which make the student smaller."
    ),
    lightning.OnExceptionCheckpoint: (
        "saves in the middle of a batch, where an exact resume is impossible. Remove it: after an error, the `last` of checkpoint "
        "is the state at the last complete batch."
    ),
    lightning.SpikeDetection: (
        "needs one loss for each batch, which may be many optimiser steps. Set trainer.gradient_clip_val: 1.0 and "
        "model.on_nonfinite: skip."
    ),
    lightning.StochasticWeightAveraging: _AVERAGES,
    lightning.WeightAveraging: _AVERAGES,
}
"""The end of the message for a callback of this class or of a subclass."""


def check_callback_classes(configured: Any) -> None:
    """Refuse callbacks in the config ``trainer.callbacks``, before they are built.

    Args:
        configured: one callback or a list, as ``class_path`` and ``init_args``.

    Raises:
        ValueError: with the key and the class, with what to use instead.
    """
    for callback in configured if isinstance(configured, list) else [configured]:
        path = callback.get("class_path") if hasattr(callback, "get") else None
        if path is not None:
            module, _, name = path.rpartition(".")
            with suppress(ImportError, AttributeError):  # the path of a class inside a class
                _refuse(getattr(import_module(module), name))


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks of a Trainer that is about to fit.

    Raises:
        ValueError: with the key and the class, with what to use instead.
    """
    for callback in callbacks:
        _refuse(type(callback))


def _refuse(kind: Any) -> None:
    found = next((base for base in getattr(kind, "__mro__", ()) if base in REFUSED), None)
    if found is not None:
        raise ValueError(f"trainer.callbacks: {kind.__name__} {REFUSED[found]}")
