"""How a token is drawn: settings, random numbers, and the draw itself.

Every row draws from its own random numbers, fixed beforehand by (seed, item), so that what a row says depends neither
on the rows decoded beside it nor on the number of ranks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Decoding:
    """How text is drawn from a model (YAML: ``max_new_tokens``, ``temperature``, ``top_k``, ``top_p``)."""

    max_new_tokens: int = 128
    """Longest response, in tokens, its end-of-sequence token included."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int = 0
    """Draw from the k most probable tokens only; 0 draws from all."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with this much probability; 1 draws from all."""

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
        ):
            if not valid:
                raise ValueError(f"decoding.{name}: expected {wanted}, got {getattr(self, name)}.")


def run_seed(seed: int | None) -> int:
    """``seed``, or that of the run: what `seed_everything` was given, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed


def stream(*key: object) -> torch.Generator:
    """A random generator that is a function of ``key`` alone, such as (seed, step, purpose)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def row_uniforms(seed: int, keys: Sequence[str], steps: int) -> Tensor:
    """Uniform numbers ``[len(keys), steps]`` float64 in [0, 1), each row a function of ``seed`` and its key alone."""
    return torch.stack([torch.rand(steps, generator=stream(seed, key), dtype=torch.float64) for key in keys])


def phase_uniforms(seed: int, phase: int | str, ids: Sequence[str], steps: int) -> Tensor:
    """`row_uniforms` of the items of one phase, such as its optimiser step.

    A rank without items gets one row, and decodes with the others.
    """
    return row_uniforms(seed, [f"{phase}/{item}" for item in ids] or [""], steps)


def draw(logits: Tensor, uniforms: Tensor, decoding: Decoding) -> Tensor:
    """One token per row by inversion of the cumulative distribution.

    Args:
        logits: ``[B, V]`` float32, divided by the temperature.
        uniforms: ``[B]`` in [0, 1).
        decoding: greedy or not, and truncation.

    Returns:
        ``[B]`` int64.
    """
    if decoding.temperature == 0:
        return logits.argmax(dim=-1)
    if decoding.top_k:
        kth = logits.topk(min(decoding.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if decoding.top_p < 1:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        outside = (probs.cumsum(dim=-1) - probs) >= decoding.top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = logits.softmax(dim=-1, dtype=wide).cumsum(dim=-1)
    # Scaling by the last sum keeps the draw inside the vocabulary whatever the rounding; side="right" skips tokens of mass 0.
    target = uniforms.to(wide)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
