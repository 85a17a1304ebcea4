"""Sampling parameters, the random numbers of each row, and the sampling of tokens.

The random numbers of a row are a function of (seed, key). So a response depends neither on the other rows of its batch nor on
the number of ranks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SamplingParams:
    """Temperature, truncation and the longest response."""

    max_new_tokens: int = 128
    """Longest response in tokens, including its end-of-sequence token."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int = 0
    """Sample from the k most probable tokens only; 0 samples from all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability; 1 samples from all."""

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
        ):
            if not valid:
                raise ValueError(f"{name}: expected {wanted}, got {getattr(self, name)}.")


def run_seed(seed: int | None) -> int:
    """``seed``, or by default the seed of the run: the argument of `seed_everything`, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed


def keyed_generator(*key: object) -> torch.Generator:
    """A random generator whose state depends on ``key`` alone, such as (seed, step, purpose)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def row_uniforms(seed: int, keys: Sequence[str], steps: int) -> Tensor:
    """Uniform numbers ``[len(keys), steps]`` float64 in [0, 1), where each row depends on ``seed`` and its key alone."""
    return torch.stack([torch.rand(steps, generator=keyed_generator(seed, key), dtype=torch.float64) for key in keys])


def phase_keys(phase: int | str, ids: Sequence[str]) -> list[str]:
    """One key per item of a phase (an optimiser step). A rank without items has one dummy row, so it gets one key."""
    return [f"{phase}/{item}" for item in ids] or [""]


def sample_tokens(logits: Tensor, uniforms: Tensor, sampling: SamplingParams) -> Tensor:
    """One token per row by inversion of the cumulative distribution.

    Args:
        logits: ``[B, V]`` float32, divided by the temperature.
        uniforms: ``[B]`` in [0, 1).
        sampling: temperature (0 is greedy) and truncation.

    Returns:
        ``[B]`` int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        outside = (probs.cumsum(dim=-1) - probs) >= sampling.top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = logits.softmax(dim=-1, dtype=wide).cumsum(dim=-1)
    # Scaling by the last sum keeps the index inside the vocabulary despite rounding; right=True skips tokens of mass 0.
    target = uniforms.to(wide)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
