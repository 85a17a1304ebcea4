"""The decode loop: one for training, evaluation and `predict`.

Every row draws from its own random numbers, fixed beforehand by (seed, item), so that what a row says depends neither on the rows
decoded beside it nor on the number of ranks. Finished rows leave the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_distill.types import TensorRecord

if TYPE_CHECKING:
    from lit_distill.models import CausalLM
    from lit_distill.types import Prompts

COMPACT_EVERY = 8
"""Steps between two looks at which rows have finished; each look waits for the device."""


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


@dataclass(frozen=True)
class Responses(TensorRecord):
    """What a model answered."""

    ids: Tensor
    """[B, T] int64; 0 after the end."""
    mask: Tensor
    """[B, T] bool: up to and including the first end-of-sequence token. The decoder's own knowledge, never `ids != pad`."""
    logprobs: Tensor
    """[B, T] float32: log-probability of each token under the model at temperature 1, untruncated; 0 after the end."""


def row_uniforms(seed: int, keys: Sequence[str], steps: int) -> Tensor:
    """Uniform numbers ``[len(keys), steps]`` float64 in [0, 1), each row a function of ``seed`` and its key alone."""
    generator = torch.Generator()
    numbers = torch.empty(len(keys), steps, dtype=torch.float64)
    for row, key in enumerate(keys):
        digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=7).digest()
        generator.manual_seed(int.from_bytes(digest, "big"))
        numbers[row] = torch.rand(steps, generator=generator, dtype=torch.float64)
    return numbers


def draw(logits: Tensor, uniforms: Tensor, decoding: Decoding) -> Tensor:
    """One token per row by inversion of the cumulative distribution.

    Args:
        logits: ``[B, V]`` float32.
        uniforms: ``[B]`` in [0, 1).
        decoding: temperature and truncation.

    Returns:
        ``[B]`` int64.
    """
    if decoding.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / decoding.temperature
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


@torch.no_grad()
def decode(
    lm: CausalLM, prompts: Prompts, decoding: Decoding, stop_ids: Sequence[int], uniforms: Tensor | None = None
) -> Responses:
    """Continue prompts until each has said an end-of-sequence token or ``max_new_tokens``.

    Args:
        lm: the model that speaks. Its dropout is switched off meanwhile.
        prompts: ``[B, P]``, padded on the left.
        decoding: how to draw.
        stop_ids: the tokens that end a response.
        uniforms: ``[B, max_new_tokens]`` from `row_uniforms`; not needed at temperature 0.

    Returns:
        `Responses` of T = the longest response.

    Raises:
        ValueError: if sampling is asked for without ``uniforms``.
    """
    from transformers.cache_utils import DynamicCache

    if decoding.temperature > 0 and uniforms is None:
        raise ValueError("decode: sampling at temperature > 0 needs the rows' random numbers; see row_uniforms.")
    device = prompts.input_ids.device
    batch, steps = len(prompts), decoding.max_new_tokens
    ids = torch.zeros(batch, steps, dtype=torch.int64, device=device)
    mask = torch.zeros(batch, steps, dtype=torch.bool, device=device)
    logprobs = torch.zeros(batch, steps, dtype=torch.float32, device=device)
    numbers = torch.zeros(batch, steps, device=device) if uniforms is None else uniforms.to(device)
    stops = torch.tensor(sorted(stop_ids), device=device)

    was_training = lm.training
    lm.eval()
    head = lm.head().in_compute_dtype()
    cache = DynamicCache(config=lm.model.config)
    tokens, attention = prompts.input_ids, prompts.attention_mask
    rows = torch.arange(batch, device=device)  # which of the batch are still speaking
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    length = 0
    for step in range(steps):
        logits = head.logits(lm(tokens, attention, cache)[:, -1])
        token = draw(logits, numbers[rows, step], decoding)
        logprob = logits.log_softmax(dim=-1).gather(-1, token[:, None])[:, 0]
        ids[rows, step] = token * alive
        mask[rows, step] = alive
        logprobs[rows, step] = logprob * alive
        length = step + 1
        alive = alive & ~torch.isin(token, stops)
        if length % COMPACT_EVERY == 0 or length == steps:
            speaking = alive.nonzero()[:, 0]
            if len(speaking) == 0:
                break
            if len(speaking) < len(rows):
                cache.batch_select_indices(speaking)
                rows, token, alive, attention = rows[speaking], token[speaking], alive[speaking], attention[speaking]
        tokens = token[:, None]
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], dim=-1)
    lm.train(was_training)
    longest = int(mask.sum(dim=-1).max()) if batch else 0
    return Responses(ids[:, :longest], mask[:, :longest], logprobs[:, :longest])
