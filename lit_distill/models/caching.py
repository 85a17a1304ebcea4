"""Whether transformers' own cache holds all that a model has read, found out once by trying.

Attention keeps keys and values. A recurrent layer (Mamba, linear attention, gated convolutions) keeps a state: padding must have no
part in it, rows must be taken from it, and some models continue it by one token at a time only. A model whose cache does not do all
that reads the whole text again for each token, which is slow and right.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from lit_distill.models.causal_lm import CausalLM
    from lit_distill.models.teacher import FrozenTeacher

log = logging.getLogger(__name__)

TOLERANCE = 0.2
"""Of the norm of hidden states: wide, since 16 bits round and experts are chosen; what a cache loses is larger."""


class Caching(NamedTuple):
    """How a model reads on from where it was."""

    works: bool
    """Whether a `DynamicCache` keeps what it has read."""
    one_by_one: bool = False
    """Whether it is to read one token at a time, after the first time."""


def recurrent_layers(cache: Cache) -> list[Any]:
    """The layers of a cache that keep a state, alone or beside keys and values."""
    return [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]


def only_recurrent(cache: Cache) -> bool:
    """Whether no layer attends, so that nothing but a state is left of what was read."""
    layers: list[bool] = getattr(cache, "is_linear", [])  # versions without such layers know none
    return bool(layers) and all(layers)


def caching_of(speaker: CausalLM | FrozenTeacher, device: torch.device) -> Caching:
    """What is known of a model, or found out now; a collective if it is sharded and not gathered.

    Args:
        speaker: student or teacher.
        device: of its inputs.
    """
    lm: Any = getattr(speaker, "lm", speaker)
    if lm.caching is None:
        lm.caching = _try_out(speaker, lm, device)
    caching: Caching = lm.caching
    return caching


@torch.no_grad()
def _try_out(speaker: CausalLM | FrozenTeacher, lm: CausalLM, device: torch.device) -> Caching:
    from transformers.cache_utils import DynamicCache

    try:
        cache = DynamicCache(config=lm.config)
        fault = _fault(speaker, cache, lm.vocabulary_size, device) if lm.takes_cache else "it takes none"
    except Exception as error:  # noqa: BLE001 - of any model
        fault = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if fault is None:
        return Caching(True, one_by_one=bool(recurrent_layers(cache)))
    log.warning(
        "%s writes text without a key-value cache, so each token takes as long as reading the whole text: %s.",
        type(lm.model).__name__,
        fault.rstrip("."),
    )
    return Caching(False)


def _fault(speaker: Any, cache: Cache, vocabulary_size: int, device: torch.device) -> str | None:
    """What is wrong with two texts of 10 tokens that are read with the cache, the second after 5 of padding, alone at the end."""
    ids = (torch.arange(20, device=device) % vocabulary_size).view(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    whole = read_whole(speaker, ids, mask)
    prompt = speaker(ids[:, :8], mask[:, :8], cache)
    states = [(*layer.conv_states.values(), *layer.recurrent_states.values()) for layer in recurrent_layers(cache)]
    if not all(any(state is not None for state in own) for own in states):
        return "it keeps its state elsewhere"
    both = speaker(ids[:, 8:9], mask[:, :9], cache)
    keep_rows(cache, torch.ones(1, dtype=torch.int64, device=device))
    alone = speaker(ids[1:, 9:], mask[1:], cache)
    for found, expected, said in (
        (prompt[0], whole[0, :8], "what it has read differs with it"),
        (prompt[1, 5:], whole[1, 5:8], "padding before a text changes what it reads"),
        (both[:, 0], whole[:, 8], "it does not go on where it was"),
        (alone[0], whole[1, 9:], "no text can be taken out of it"),
    ):
        distance = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-9)
        if not float(distance.mean()) <= TOLERANCE:  # NaN is wrong
            return said
    return None


def keep_rows(cache: Cache, rows: Tensor) -> None:
    """Let a cache hold ``rows`` of its texts only; `batch_select_indices` does not know recurrent layers, and this does."""
    cache.reorder_cache(rows)  # type: ignore[arg-type]


def read_whole(speaker: CausalLM | FrozenTeacher, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden rows ``[B, S, H]`` of texts that are padded on the left, read without a cache and with the padding moved to the right.

    There it changes nothing for any model that reads from left to right. The rows of padding mean nothing.
    """
    width = ids.shape[1]
    columns = torch.arange(width, device=ids.device)
    padding = width - mask.sum(dim=-1, keepdim=True)
    moved = (columns + padding) % width
    hidden = speaker(ids.gather(1, moved), mask.gather(1, moved))
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    return hidden[rows, (columns - padding) % width]
