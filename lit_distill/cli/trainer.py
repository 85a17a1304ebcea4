"""Lightning's Trainer with ``precision: auto``, which chooses the fast precision of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.connector import _PRECISION_INPUT
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.cli.caching import CacheData, CacheRun
from lit_distill.files import LOCK_FILE, release_lock
from lit_distill.models.precision import auto_precision
from lit_distill.module import DistillationModule
from lit_distill.teachers.store import Form
from lit_distill.teachers.writing import CacheOptions
from lit_distill.types import arguments_of


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

    def cache(
        self,
        model: DistillationModule,
        datamodule: Any,
        path: str,
        form: Form = "hidden",
        top_k: int = 64,
        num_draws: int = 50,
        dtype: Literal["float32", "bfloat16"] | None = None,
        splits: tuple[str, ...] = ("train", "validation", "test"),
    ) -> None:
        """Write a teacher cache: what the teacher predicts for every item, so that training does not need the teacher.

        A run that was stopped goes on where it stopped if it is started again.

        Args:
            model: the module; only its teacher is loaded.
            datamodule: the data.
            path: folder of the cache.
            form: hidden (exact), topk, or sampled (unbiased for ForwardKL); see `CachedTeacher`.
            top_k: tokens at each position, of form topk.
            num_draws: draws at each position, of form sampled, at most 63.
            dtype: of the hidden states, of form hidden; by default the teacher's.
            splits: splits of the data; a test split that there is none of is left out.
        """
        with arguments_of(model):
            options = CacheOptions(form, top_k, num_draws, dtype=None if dtype is None else getattr(torch, dtype))
            run, data = CacheRun(model, Path(path).expanduser(), options), CacheData(datamodule, splits)
        callbacks: list[Any] = self.callbacks  # type: ignore[has-type]
        self.callbacks = []  # none of them is about this
        try:
            self.predict(run, datamodule=data, return_predictions=False)
        finally:
            self.callbacks = callbacks
            release_lock(run.folder / LOCK_FILE)


def _device_type(accelerator: Any) -> str:
    """The type of device that Lightning will choose for ``trainer.accelerator``."""
    if accelerator in ("auto", "gpu"):
        found = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if found is None else found.type
    return accelerator if isinstance(accelerator, str) else "cpu"
