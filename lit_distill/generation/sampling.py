"""Sampling parameters, the random numbers of each row, and the sampling of tokens.

The random numbers of a row are a function of (seed, key). So a response depends neither on the other rows of its batch nor on
the number of ranks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""Tokens whose probabilities are added up before they are accumulated over the vocabulary."""


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


class Sample(NamedTuple):
    """One token per row."""

    tokens: Tensor
    """[B] int64."""
    logprobs: Tensor
    """[B] float32 log-probability of each under the softmax of all logits, also if the sampling was truncated."""


def sample_tokens(logits: Tensor, uniforms: Tensor, sampling: SamplingParams) -> Tensor:
    """The tokens of `sample`, ``[B]`` int64."""
    return sample(logits, uniforms, sampling).tokens


def sample(logits: Tensor, uniforms: Tensor, sampling: SamplingParams) -> Sample:
    """Sample one token per row with the inverse of the cumulative distribution.

    Args:
        logits: ``[B, V]`` float32, already divided by the temperature.
        uniforms: ``[B]`` in [0, 1).
        sampling: temperature (0 is greedy) and truncation.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=-1)
        return Sample(tokens, token_logprobs(logits, tokens))
    truncated = _truncated(logits, sampling)
    largest = truncated.amax(dim=-1, keepdim=True)
    mass = torch.sub(truncated, largest).exp_()  # not normalised: two more passes over the vocabulary
    tokens, total = _inverse_cumulative(mass, uniforms)
    if truncated is not logits:
        return Sample(tokens, token_logprobs(logits, tokens))
    logprobs = logits.gather(-1, tokens[:, None]) - largest - total.log().float()
    return Sample(tokens, logprobs[:, 0])


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability ``[B]`` of one token per row, from logits ``[B, V]``."""
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)


def _truncated(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """``logits`` with -inf for the tokens that top_k and top_p exclude; the same object if they are off."""
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        outside = (probs.cumsum(dim=-1) - probs) >= sampling.top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


def _inverse_cumulative(mass: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The token ``[B]`` at which the cumulative ``mass`` ``[B, V]`` passes ``uniforms`` times its total, and the total ``[B, 1]``.

    Sums are float64, but only those of `BLOCK` tokens each are accumulated over the vocabulary.
    """
    wide = torch.float32 if mass.device.type == "mps" else torch.float64
    vocabulary = mass.shape[-1]
    whole = vocabulary - vocabulary % BLOCK
    sums = mass[:, :whole].unflatten(-1, (whole // BLOCK, BLOCK)).sum(-1, dtype=wide)
    if whole < vocabulary:
        sums = torch.cat([sums, mass[:, whole:].sum(-1, keepdim=True, dtype=wide)], dim=-1)
    edges = sums.cumsum(-1)
    block, rest = _first_above(edges, uniforms.to(wide)[:, None] * edges[:, -1:])
    columns = block * BLOCK + torch.arange(BLOCK, device=mass.device)
    inside = mass.gather(-1, columns.clamp(max=vocabulary - 1)).to(wide) * (columns < vocabulary)
    place, _ = _first_above(inside.cumsum(-1), rest)
    return (block * BLOCK + place)[:, 0], edges[:, -1:]


def _first_above(cumulative: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first index ``[B, 1]`` whose cumulative sum is above ``target`` ``[B, 1]``, and by how much the one before it is below.

    It is never an index without mass, even if rounding has raised the target to the last sum.
    """
    last = cumulative[:, -1:]
    target = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[-1] - 1)  # NaN has none
    before = cumulative.gather(-1, (index - 1).clamp(min=0)) * (index > 0)
    return index, target - before
