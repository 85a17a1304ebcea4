"""The device under test: its description, temporary folder and log settings."""

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
from lit_distill.models.precision import multiplies_fast

EMULATED = "this CPU emulates bfloat16"


@dataclass(frozen=True)
class Machine:
    """Device, folder and problem sizes of the checks."""

    device: torch.device
    folder: Path
    """Temporary folder of the checks."""
    runs: dict[str, Any] = field(default_factory=dict)
    """Recorded results of runs, by config."""

    @property
    def cuda(self) -> bool:
        """Whether it is a CUDA device; on a CPU the checks use smaller sizes."""
        return self.device.type == "cuda"

    def emulates(self, precision: str) -> bool:
        """Whether it is a CPU without units for this precision, on which a run in it is left out."""
        return precision == "bf16-mixed" and not (self.cuda or multiplies_fast(torch.bfloat16, self.device.type))

    @property
    def steps(self) -> int:
        """Optimiser steps of a quickstart."""
        return 20 if self.cuda else 3

    def wait(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Free memory, and turn off the detection of synchronisations."""
        gc.collect()
        if self.cuda:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.empty_cache()

    def autocast(self, precision: str) -> torch.autocast:
        """The autocast context that Lightning uses for a step."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False)


def describe(device: str) -> dict[str, str]:
    """Device name and versions, for the header of the table."""
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
    """Hide progress bars, log lines and warnings of runs; errors are still shown."""
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
