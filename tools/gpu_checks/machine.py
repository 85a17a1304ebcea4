"""The device that is checked: what it is called, where its files go, and how it is kept quiet."""

from __future__ import annotations

import gc
import logging
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import lightning
import torch
import transformers

import lit_distill


@dataclass(frozen=True)
class Machine:
    """Where the checks run, and how large they are."""

    device: torch.device
    folder: Path
    """Temporary."""
    runs: dict[str, Any] = field(default_factory=dict)
    """What runs have done, by their config."""

    @property
    def cuda(self) -> bool:
        """Whether it is a CUDA device; a processor gets smaller sizes."""
        return self.device.type == "cuda"

    @property
    def steps(self) -> int:
        """Optimiser steps of a quickstart."""
        return 20 if self.cuda else 3

    def wait(self) -> None:
        """Until all that was asked of the device is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Give memory back, and stop looking for waits."""
        gc.collect()
        if self.cuda:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.empty_cache()

    def autocast(self, precision: str) -> torch.autocast:
        """What Lightning's precision plugin enters for a step."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False)


def describe(device: str) -> dict[str, str]:
    """Name and versions, for the head of the table."""
    card = platform.processor() or platform.machine()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        card = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    else:
        info = Path("/proc/cpuinfo")
        names = [line for line in info.read_text().splitlines() if "model name" in line] if info.is_file() else []
        card = f"{names[0].partition(':')[2].strip() if names else card}, {torch.get_num_threads()} threads"
    return {
        "device": card,
        "versions": f"lit_distill {lit_distill.__version__}, torch {torch.__version__}, lightning {lightning.__version__}, "
        f"transformers {transformers.__version__}, python {platform.python_version()}",
        "float32 products": "TF32 off (torch.set_float32_matmul_precision: highest)",
    }


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, notes and warnings of a run between the rows; errors still show."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    noisy = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lit_distill")]
    before = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(noisy, before, strict=True):
                logger.setLevel(level)
