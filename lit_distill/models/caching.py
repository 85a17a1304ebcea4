"""Tests once whether a model generates correctly with the cache of transformers.

Attention caches keys and values. A recurrent layer (Mamba, linear attention, gated convolutions) caches a state: padding must not
change it, rows must be selectable, and some models can extend it by only one token at a time. If a model's cache fails one of these
tests, the whole text is processed again for each new token, which is slow but correct.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


log = logging.getLogger(__name__)

TOLERANCE = 0.2
"""Allowed error relative to the norm of hidden states. It is wide because 16-bit rounding can select other experts; a broken cache
causes a larger error."""


class ForwardFunction(Protocol):
    """The forward pass of a student or a teacher, see `CausalLM.forward`."""

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``[B, S, H]``."""
        ...


class Caching(NamedTuple):
    """How a model can use a KV cache."""

    works: bool
    """Whether the model computes the same with a cache as without."""
    one_by_one: bool = False
    """Whether it must process one token at a time after the prompt."""


def recurrent_layers(cache: Cache) -> list[Any]:
    """The layers of a cache that have a recurrent state, with or without keys and values."""
    return [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]


def only_recurrent(cache: Cache) -> bool:
    """Whether the model has no attention layer, so that the cache contains recurrent states only."""
    layers: list[bool] = getattr(cache, "is_linear", [])  # older versions of transformers lack the attribute
    return bool(layers) and all(layers)


def caching_of(model: ForwardFunction, device: torch.device) -> Caching:
    """The model's `Caching`, tested at the first call; a collective if the model is sharded and not gathered.

    Args:
        model: student or teacher.
        device: device of the inputs.
    """
    lm: Any = getattr(model, "lm", model)
    if lm.caching is None:
        lm.caching = _test_caching(model, lm, device)
    caching: Caching = lm.caching
    return caching


@torch.no_grad()
def _test_caching(model: ForwardFunction, lm: Any, device: torch.device) -> Caching:
    from lit_distill.models.kv_cache import new_cache

    try:
        cache = new_cache(lm.config, columns=9)  # one less than the text has, so that it must grow
        fault = (
            _find_cache_fault(model, cache, lm.vocabulary_size, device)
            if lm.takes_cache
            else "its forward takes no cache"
        )
    except Exception as error:  # noqa: BLE001 - a model may raise anything
        fault = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if fault is None:
        return Caching(True, one_by_one=bool(recurrent_layers(cache)))
    log.warning(
        "%s generates without a key-value cache, so each new token costs a forward pass over the whole text: %s.",
        type(lm.model).__name__,
        fault.rstrip("."),
    )
    return Caching(False)


def _find_cache_fault(model: Any, cache: Cache, vocabulary_size: int, device: torch.device) -> str | None:
    """Compare hidden states with and without the cache; return a description of the first difference, or None.

    There are two texts of 10 tokens. The second starts with 5 padding tokens, and is the only one kept for the last token.
    """
    ids = (torch.arange(20, device=device) % vocabulary_size).view(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    whole = read_whole(model, ids, mask)
    prompt = model(ids[:, :8], mask[:, :8], cache)
    states = [(*layer.conv_states.values(), *layer.recurrent_states.values()) for layer in recurrent_layers(cache)]
    if not all(any(state is not None for state in own) for own in states):
        return "its recurrent state is not in the cache"
    both = model(ids[:, 8:9], mask[:, :9], cache)
    keep_rows(cache, torch.ones(1, dtype=torch.int64, device=device))
    alone = model(ids[1:, 9:], mask[1:], cache)
    for found, expected, message in (
        (prompt[0], whole[0, :8], "the hidden states of a prompt differ with the cache"),
        (prompt[1, 5:], whole[1, 5:8], "padding before a prompt changes its hidden states"),
        (both[:, 0], whole[:, 8], "the token after a prompt gets other hidden states"),
        (alone[0], whole[1, 9:], "selecting one text of a batch changes its hidden states"),
    ):
        if not relative_distance(found, expected) <= TOLERANCE:  # NaN fails too
            return message
    return None


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """The mean distance of rows ``[..., H]`` relative to the norm of the expected ones; NaN if there is one."""
    gaps = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-9)
    return float(gaps.mean())


def keep_rows(cache: Cache, rows: Tensor) -> None:
    """Keep only ``rows`` of the batch in a cache. Unlike `batch_select_indices`, this also works for recurrent layers."""
    cache.reorder_cache(rows)  # type: ignore[arg-type]


def read_whole(model: ForwardFunction, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states ``[B, S, H]`` of left-padded texts, computed without a cache and with the padding moved to the right.

    On the right, padding changes nothing in any causal model. Hidden states of padding are meaningless.
    """
    width = ids.shape[1]
    columns = torch.arange(width, device=ids.device)
    padding = width - mask.sum(dim=-1, keepdim=True)
    moved = (columns + padding) % width
    hidden = model(ids.gather(1, moved), mask.gather(1, moved))
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    return hidden[rows, (columns - padding) % width]
