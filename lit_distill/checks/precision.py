"""Precisions that overflow, round what is measured, or do not know the models."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

_ADVICE = "Use 32-true or bf16-mixed."
_HALF = f"overflows in the loss of long rows. {_ADVICE}"
_DOUBLE = f"is more than what the losses are computed in, which is 32 bits. {_ADVICE}"
_ENGINE = f"replaces layers of models that are not loaded yet. {_ADVICE}"
REFUSED = {
    "16": _HALF,
    "16-mixed": _HALF,
    "16-true": _HALF,
    "64": _DOUBLE,
    "64-true": _DOUBLE,
    "bf16-true": (
        "would round what is measured too. For a student whose weights have 16 bits, set model.student.dtype: bfloat16 and leave "
        "trainer.precision at 32-true; or use bf16-mixed."
    ),
    "transformer-engine": _ENGINE,
    "transformer-engine-float16": _ENGINE,
}
"""What is said of a precision, by the name that YAML or Lightning's plugin gives it."""
EVALUATES = ("16", "16-mixed")
"""Of these, what is good enough where nothing is learnt."""
PLUGINS = ("Precision", "MixedPrecision")


def check_precision(precision: Any, trains: bool = True) -> None:
    """Refuse a precision.

    Args:
        precision: ``trainer.precision`` in YAML, or that of a Trainer, where plugins count too.
        trains: whether the run is `fit`.

    Raises:
        ValueError: naming the key, with what to use.
    """
    name = str(precision)
    if name in REFUSED and (trains or name not in EVALUATES):
        raise ValueError(f"trainer.precision: {name} {REFUSED[name]}")


def check_plugins(trainer: Any) -> None:
    """Refuse plugins of Lightning that change the models' layers or how checkpoints are written; your own may do so.

    Raises:
        ValueError: naming the key and the class.
    """
    precision, checkpoints = trainer.precision_plugin, trainer.strategy.checkpoint_io
    if _is_lightnings(precision) and type(precision).__name__ not in PLUGINS:
        raise ValueError(f"trainer.plugins: {type(precision).__name__} {_ENGINE}")
    if _is_lightnings(checkpoints) and type(checkpoints) is not TorchCheckpointIO:
        raise ValueError(
            f"trainer.plugins: {type(checkpoints).__name__} may leave a part of a checkpoint behind, and one here is whole or not "
            "there. Remove it."
        )


def _is_lightnings(plugin: object) -> bool:
    return type(plugin).__module__.startswith("lightning.")
