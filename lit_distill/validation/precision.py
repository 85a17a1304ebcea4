"""Refuses precisions that overflow, that round losses and metrics, or that replace layers."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

_ADVICE = "Use 32-true or bf16-mixed."
_HALF = f"overflows in the loss of long texts. {_ADVICE}"
_DOUBLE = f"is more precise than the losses, which are computed in 32 bits. {_ADVICE}"
_ENGINE = f"replaces layers of models that are not loaded yet. {_ADVICE}"
REFUSED = {
    "16": _HALF,
    "16-mixed": _HALF,
    "16-true": _HALF,
    "64": _DOUBLE,
    "64-true": _DOUBLE,
    "bf16-true": (
        "would also round losses and metrics. For a student with 16-bit weights, set model.student.dtype: bfloat16 and leave "
        "trainer.precision at 32-true; or use bf16-mixed."
    ),
    "transformer-engine": _ENGINE,
    "transformer-engine-float16": _ENGINE,
}
"""The end of the message for a precision, by its name in YAML or in Lightning's plugin."""
ALLOWED_WITHOUT_TRAINING = ("16", "16-mixed")
"""Refused for `fit` only: precise enough for evaluation."""
PLUGINS = ("Precision", "MixedPrecision")


def check_precision(precision: Any, trains: bool = True) -> None:
    """Refuse a precision.

    Args:
        precision: ``trainer.precision`` in YAML, or that of a Trainer, which a plugin may have set.
        trains: whether the run is `fit`.

    Raises:
        ValueError: with the key, with what to use.
    """
    name = str(precision)
    if name in REFUSED and (trains or name not in ALLOWED_WITHOUT_TRAINING):
        raise ValueError(f"trainer.precision: {name} {REFUSED[name]}")


def check_plugins(trainer: Any) -> None:
    """Refuse plugins of Lightning that change the models' layers or how checkpoints are written; your own may do so.

    Raises:
        ValueError: with the key and the class.
    """
    precision, checkpoints = trainer.precision_plugin, trainer.strategy.checkpoint_io
    if _is_from_lightning(precision) and type(precision).__name__ not in PLUGINS:
        raise ValueError(f"trainer.plugins: {type(precision).__name__} {_ENGINE}")
    if _is_from_lightning(checkpoints) and type(checkpoints) is not TorchCheckpointIO:
        raise ValueError(
            f"trainer.plugins: {type(checkpoints).__name__} may leave an incomplete checkpoint, but checkpoints here are written "
            "atomically. Remove it."
        )


def _is_from_lightning(plugin: object) -> bool:
    return type(plugin).__module__.startswith("lightning.")
