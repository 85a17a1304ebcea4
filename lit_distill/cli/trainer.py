"""Lightning's Trainer with ``precision: auto``, which chooses the fast precision of the machine."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.fabric.connector import _PRECISION_INPUT
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.models.precision import auto_precision


class DistillTrainer(Trainer):
    """Lightning's Trainer with all of its arguments.

    Args:
        precision: a value of Lightning's, such as 32-true or bf16-mixed; or auto: bf16-mixed if the device multiplies bfloat16
            fast, otherwise 32-true.
    """

    def __init__(self, *args: Any, precision: _PRECISION_INPUT | Literal["auto"] | None = None, **kwargs: Any) -> None:
        if precision == "auto":
            device_type = _device_type(kwargs.get("accelerator", "auto"))
            precision = auto_precision(device_type)
            rank_zero_info(f"trainer.precision: auto is {precision} on this {device_type}.")
        super().__init__(*args, precision=precision, **kwargs)


def _device_type(accelerator: Any) -> str:
    """The type of device that Lightning will choose for ``trainer.accelerator``."""
    if accelerator in ("auto", "gpu"):
        found = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if found is None else found.type
    return accelerator if isinstance(accelerator, str) else "cpu"
