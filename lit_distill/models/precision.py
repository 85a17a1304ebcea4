"""Which types of numbers a device multiplies fast and right, and what `auto` stands for on it.

A processor without units for bfloat16 emulates its products: up to 200 times slower than float32, by the layout of the
matrices. Every float32 represents a bfloat16 exactly, so there the products run in float32.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

CAPABILITIES = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "fp16"),
}
"""Instructions that multiply numbers of 16 bits, by the names of ``torch.cpu.get_capabilities``: Intel's and AMD's, then ARM's."""


@cache
def multiplies_fast(dtype: torch.dtype, device_type: str) -> bool:
    """Whether products of ``dtype`` are at least as fast as those of float32 on a kind of device.

    Every process of one machine gets the same answer where PyTorch knows the processor; otherwise one small product is timed.
    """
    if dtype not in CAPABILITIES:
        return True
    if device_type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return device_type != "mps" or dtype == torch.float16
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if any(name in known for name in CAPABILITIES[dtype]):
        return any(known.get(name, False) for name in CAPABILITIES[dtype])
    return _time_of_product(dtype) < _time_of_product(torch.float32)


def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """``dtype``, or float32 where products of ``dtype`` would be emulated."""
    return dtype if multiplies_fast(dtype, device_type) else torch.float32


def avoid_cudnn_attention(device_type: str) -> None:
    """Leave the attention of cuDNN out of what PyTorch chooses from, in this process; `forward_only` takes it in again.

    Its backward gives NaN for the queries where a mask is passed and the scores are low (PyTorch 2.11 to 2.13 on Hopper, 16 bits);
    on an H200 the shipped MiniLLM and DPKD runs met it after a dozen steps. Padded batches always pass a mask.

    Source: https://github.com/pytorch/pytorch/issues/196678.
    """
    if device_type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def forward_only(device_type: str) -> Iterator[None]:
    """Let PyTorch choose from all kernels of attention where no gradient is taken: generation and frozen models."""
    if device_type != "cuda" or torch.backends.cuda.cudnn_sdp_enabled():
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def auto_dtype(device_type: str) -> torch.dtype:
    """What ``dtype: auto`` of a frozen model stands for: bfloat16 where it is fast, else float32."""
    return product_dtype(torch.bfloat16, device_type)


def auto_precision(device_type: str) -> Literal["bf16-mixed", "32-true"]:
    """What ``trainer.precision: auto`` stands for: bf16-mixed where bfloat16 is fast, else 32-true."""
    return "bf16-mixed" if multiplies_fast(torch.bfloat16, device_type) else "32-true"


def emulated(key: str, dtype: torch.dtype, device_type: str) -> str | None:
    """What to tell the user who asked for a ``dtype`` under ``key`` that the device emulates; None where it does not."""
    if multiplies_fast(dtype, device_type):
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"{key}: this {device_type} emulates products of {name}, which may take 200 times as long as those of float32. "
        "Set it to auto for what is fast on each machine."
    )


def _time_of_product(dtype: torch.dtype) -> float:
    """Seconds of the fastest of five products ``[64, 1024] · [1024, 512]``."""

    def seconds(left: Tensor, right: Tensor) -> float:
        start = time.perf_counter()
        left @ right
        return time.perf_counter() - start

    left, right = torch.ones(64, 1024, dtype=dtype), torch.ones(1024, 512, dtype=dtype)
    return min(seconds(left, right) for _ in range(5))
