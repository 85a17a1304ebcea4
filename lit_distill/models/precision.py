"""Which dtypes a device multiplies fast, and how `auto` is resolved on it.

A CPU without bfloat16 instructions emulates these products: up to 200 times slower than float32, depending on the layout of the
matrices. float32 represents every bfloat16 exactly, so on such a CPU the products are computed in float32.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_distill.models.quantization import is_plain

KEPT_MEMORY = 512 * 2**20
"""Bytes of freed memory that a process on a CPU keeps for its next tensors."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``."""

CAPABILITIES = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "fp16"),
}
"""16-bit matrix instructions, by their names in ``torch.cpu.get_capabilities``: first those of Intel and AMD, then those of ARM."""


@cache
def multiplies_fast(dtype: torch.dtype, device_type: str) -> bool:
    """Whether products of ``dtype`` are at least as fast as those of float32 on this device type.

    If PyTorch knows the CPU's instructions, the result is the same in every process of a machine; else a small product is timed.
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
    """``dtype``, or float32 if the device emulates products of ``dtype``."""
    return dtype if multiplies_fast(dtype, device_type) else torch.float32


def avoid_cudnn_attention(device_type: str) -> None:
    """Disable cuDNN attention in this process; `forward_only` enables it again.

    Its backward pass gives NaN gradients of the queries if a mask is passed and the scores are low (PyTorch 2.11 to 2.13 on Hopper,
    16 bits). On an H200 this happened in the shipped MiniLLM and DPKD runs after a dozen steps. Padded batches always pass a mask.

    Source: https://github.com/pytorch/pytorch/issues/196678.
    """
    if device_type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def keep_freed_memory(device_type: str) -> None:
    """On a CPU with glibc, keep up to `KEPT_MEMORY` bytes of freed memory in this process.

    By default glibc returns more than 64 MB to the system. The chunks of logits free that much many times per step, and the system
    would clear every page again: 8 % of the processor time of the loss.
    """
    if device_type != "cpu" or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that is allowed, and what `CHUNK_BYTES` stays below
        mallopt(M_TRIM_THRESHOLD, KEPT_MEMORY)


@contextmanager
def forward_only(device_type: str) -> Iterator[None]:
    """Allow all attention kernels while no gradient is computed: generation and frozen models."""
    if device_type != "cuda" or torch.backends.cuda.cudnn_sdp_enabled():
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def weights_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside the context, the model has copies of its floating-point weights in ``dtype`` as its parameters; None changes nothing.

    Afterwards it has its own parameters again, the same objects as before. Quantised weights stay as they are.
    """
    copies: dict[nn.Parameter, nn.Parameter] = {}  # a tied weight is copied once
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in model.modules() if dtype is not None else ():
            for name, own in list(module._parameters.items()):
                if own is None or own.dtype == dtype or not own.is_floating_point() or not is_plain(own):
                    continue
                if own not in copies:
                    copies[own] = nn.Parameter(own.detach().to(dtype), requires_grad=False)
                replaced.append((module, name, own))
                module._parameters[name] = copies[own]
        yield
    finally:
        for module, name, own in replaced:
            module._parameters[name] = own


def auto_dtype(device_type: str) -> torch.dtype:
    """Dtype for ``dtype: auto`` of a frozen model: bfloat16 if it is fast on the device, else float32."""
    return product_dtype(torch.bfloat16, device_type)


def auto_precision(device_type: str) -> Literal["bf16-mixed", "32-true"]:
    """Precision for ``trainer.precision: auto``: bf16-mixed if bfloat16 is fast on the device, else 32-true."""
    return "bf16-mixed" if multiplies_fast(torch.bfloat16, device_type) else "32-true"


def emulated(key: str, dtype: torch.dtype, device_type: str) -> str | None:
    """Message for the user if the device emulates the ``dtype`` that ``key`` requests, else None."""
    if multiplies_fast(dtype, device_type):
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"{key}: this {device_type} emulates products of {name}, which may take 200 times as long as those of float32. "
        f"Set {key}: auto to use a dtype that is fast on each machine."
    )


def _time_of_product(dtype: torch.dtype) -> float:
    """Seconds taken by the fastest of five products ``[64, 1024] · [1024, 512]``."""

    def seconds(left: Tensor, right: Tensor) -> float:
        start = time.perf_counter()
        left @ right
        return time.perf_counter() - start

    left, right = torch.ones(64, 1024, dtype=dtype), torch.ones(1024, 512, dtype=dtype)
    return min(seconds(left, right) for _ in range(5))
