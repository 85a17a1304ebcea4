r"""Compressed next-token distributions: the k most probable tokens, or tokens drawn from the distribution, in packed integers.

The most probable tokens say nothing about the others, so a student trained on them alone is overconfident. Draws have noise but
no bias: the expectation of their frequencies is the distribution, and so is that of every gradient linear in it.

Source: Anshumann et al. 2025, https://arxiv.org/abs/2503.16870. Ours draws from the distribution itself, where the paper may draw
from a tempered one with importance weights; the counts then need no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_BYTES = 2**24
"""Size of the float64 buffer of the rows that `draw` handles together; a CPU is half as fast with large ones."""
MOST_BITS = 32


class Draws(NamedTuple):
    """Tokens drawn for n rows. The distinct tokens of all rows follow each other, M in total."""

    sizes: Tensor
    """[n] int64: number of distinct tokens of each row, at least 1."""
    ids: Tensor
    """[M] int64, ascending inside a row."""
    counts: Tensor
    """[M] int64, at least 1: how often each was drawn; they add up to ``num_draws`` in every row."""


def bits_for(vocabulary_size: int) -> int:
    """Number of bits that hold every token id below ``vocabulary_size`` (17 for 128k tokens), at least 1."""
    if vocabulary_size < 1:
        raise ValueError(f"vocabulary_size: expected at least 1, got {vocabulary_size}.")
    return max(1, (vocabulary_size - 1).bit_length())


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers of ``bits`` bits each, without gaps inside a row, the lowest bit first.

    Args:
        values: ``[n, k]`` integers, 0 <= value < 2**bits.
        bits: 1 to 32.

    Returns:
        ``[n, ceil(k * bits / 8)]`` uint8. The bits that are left at the end of a row are 0.

    Raises:
        ValueError: if a value needs more bits, or is negative.
    """
    _check_bits(bits)
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >> bits):
        raise ValueError(
            f"values: expected 0 to {2**bits - 1}, which {bits} bits hold, got {int(values.min())} to {int(values.max())}."
        )
    n, k = values.shape
    groups = F.pad(values.long(), (0, -k % 8)).view(n, -(-k // 8), 8)
    packed = groups.new_zeros(*groups.shape[:2], bits, dtype=torch.uint8)
    for value, byte, shift in _overlaps(bits):
        part = groups[..., value] >> shift if shift >= 0 else groups[..., value] << -shift
        packed[..., byte] |= (part & 0xFF).to(torch.uint8)
    return packed.flatten(1)[:, : -(-k * bits // 8)].contiguous()


def unpack_bits(packed: Tensor, k: int, bits: int) -> Tensor:
    """The values ``[n, k]`` int64 of `pack_bits`.

    Args:
        packed: ``[n, ceil(k * bits / 8)]`` uint8.
        k: values of a row.
        bits: as they were packed.

    Raises:
        ValueError: if the rows do not have that many bytes.
    """
    _check_bits(bits)
    n, size = packed.shape
    if size != -(-k * bits // 8):
        raise ValueError(f"packed: {k} values of {bits} bits need {-(-k * bits // 8)} bytes a row, got {size}.")
    num_groups = -(-k // 8)
    groups = F.pad(packed, (0, num_groups * bits - size)).view(n, num_groups, bits)
    values = groups.new_zeros(n, num_groups, 8, dtype=torch.int64)
    for value, byte, shift in _overlaps(bits):
        part = groups[..., byte].long()
        values[..., value] |= part << shift if shift >= 0 else part >> -shift
    return (values & (2**bits - 1)).flatten(1)[:, :k]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"bits: expected 1 to {MOST_BITS}, got {bits}.")


def _overlaps(bits: int) -> Iterator[tuple[int, int, int]]:
    """Value, byte that shares bits with it, and how many bits later the byte begins, in 8 values, which take ``bits`` bytes."""
    for value in range(8):
        for byte in range(bits):
            shift = 8 * byte - bits * value
            if -8 < shift < bits:
                yield value, byte, shift


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of each row, the most probable first.

    Args:
        logits: ``[n, V]``, of any floating-point dtype.
        k: 1 to V.

    Returns:
        Token ids ``[n, k]`` int64 and their log-probabilities ``[n, k]`` float32, normalised over all V tokens.

    Raises:
        ValueError: if k is larger than the vocabulary, or logits are NaN or +inf.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k: expected 1 to {logits.shape[-1]}, the size of the vocabulary, got {k}.")
    values, ids = logits.topk(k, dim=-1)
    highest = values[:, :1].float()  # subtracted first: beside a large logit, a small log-probability loses precision
    mass = (logits.float() - highest).exp_().sum(-1, keepdim=True)
    _check_mass(mass)
    return ids, values.float() - highest - mass.log()


def draw(logits: Tensor, num_draws: int, generator: torch.Generator) -> Draws:
    """Tokens drawn with replacement from softmax(logits): ``counts / num_draws`` is an unbiased estimate of the probabilities.

    Each draw is the first token whose cumulative probability exceeds a uniform number. Both are float64:
    float32 numbers near 1 are 6e-8 apart, so the sums would change or lose the probabilities of rare tokens.

    Args:
        logits: ``[n, V]``, of any floating-point dtype, on a device that has float64.
        num_draws: per row, at least 1.
        generator: its numbers are used row after row, so the draws do not depend on how rows are divided into calls. One on the
            CPU gives the same numbers whatever the device of the logits.

    Raises:
        ValueError: if logits are NaN or +inf, or all of a row are -inf.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws: expected at least 1, got {num_draws}.")
    n, vocabulary = logits.shape
    uniforms = torch.rand(n, num_draws, dtype=torch.float64, generator=generator, device=generator.device)
    uniforms = uniforms.to(logits.device).sort(-1).values  # so are the ids, then
    block = max(1, BLOCK_BYTES // (8 * vocabulary))
    parts = zip(logits.split(block), uniforms.split(block), strict=True)
    ids = torch.cat([_inverse_cdf(*part) for part in parts])
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = is_first.flatten().nonzero()[:, 0]
    counts = starts.diff(append=starts.new_full((1,), ids.numel()))
    return Draws(is_first.sum(-1), ids.flatten()[starts], counts)


def _inverse_cdf(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids ``[n, num_draws]`` for float64 numbers in [0, 1)."""
    cumulative = logits.softmax(-1, dtype=torch.float64).cumsum_(-1)
    total = cumulative[:, -1:]
    _check_mass(total)
    # right: never a token of probability 0. The product rounds below the total, so the index is below V.
    return torch.searchsorted(cumulative, uniforms * total, right=True)


def _check_mass(mass: Tensor) -> None:
    if not bool(mass.isfinite().all()):
        raise ValueError("logits: some are NaN or +inf, or all of a row are -inf; the model that made them overflowed.")
