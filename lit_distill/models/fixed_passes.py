"""Forward passes over the last few tokens of a batch in which no size depends on the step, so that a CUDA graph can replay them.

Attention reads whole buffers of keys and values. A mask, computed on the device, hides what is not written yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lit_distill.models.caching import TOLERANCE, caching_of, read_whole, relative_distance
from lit_distill.models.kv_cache import BufferedLayer, FixedLayer, new_cache
from lit_distill.models.replay import Capture, CudaCapture, Replays

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from lit_distill.models.caching import ForwardFunction
    from lit_distill.models.causal_lm import CausalLM

READ_COLUMNS = 512
"""Attention reads a multiple of this many columns, or of a quarter of them all: at most four numbers, each with its own graphs.
Below that, reading columns that are not written yet costs less than a capture."""
SAME = {torch.float32: 2e-5}
"""Largest relative distance of a replay from the same pass without it; 0.02 with 16 bits, where another kernel rounds otherwise."""


class FixedPasses:
    """The passes of one model over one set of rows.

    Args:
        model: student or teacher.
        cache: of `new_cache` for `padded_columns` columns, with the prompts in it. Its keys and values are extended in place.
        mask: ``[b, C]`` attention mask of all columns, also those that are not generated yet.
        capture: makes a pass replayable.
    """

    def __init__(self, model: ForwardFunction, cache: Cache, mask: Tensor, capture: Capture) -> None:
        self.model = model
        self.layers = cast("list[BufferedLayer]", cache.layers)
        self.real = mask.new_zeros(len(mask), padded_columns(mask.shape[1]), dtype=torch.bool)
        """[b, columns] which columns are no padding."""
        self.real[:, : mask.shape[1]] = mask
        self.positions = (self.real.cumsum(dim=-1) - 1).clamp(min=0)
        self.replays = Replays(capture)
        self.read = 0
        """How many columns attention reads in the current pass."""
        for layer in self.layers:
            layer.clear_tail()  # NaN under a mask would still be NaN

    def run(self, text_length: int, size: int, work: Callable[[int], None]) -> None:
        """Do or replay ``work(size)``, which calls `hidden` on the last ``size`` tokens of texts of ``text_length`` columns."""
        total = self.real.shape[1]
        block = max(READ_COLUMNS, padded_columns(-(-total // 4)))
        self.read = min(total, -(-text_length // block) * block)
        self.replays.run((size, self.read), partial(work, size))
        for layer in self.layers:
            layer.set_length(text_length)

    def hidden(self, input_ids: Tensor, columns: Tensor) -> Tensor:
        """Hidden states ``[b, s, H]`` of tokens ``[b, s]`` at ``columns`` ``[s]`` of texts; those before are in the cache."""
        past = torch.arange(self.read, device=columns.device) <= columns[:, None]
        mask = self.real[:, None, None, : self.read] & past
        cache = DynamicCache()
        cache.layers = [FixedLayer(layer, columns, self.read) for layer in self.layers]
        return self.model(input_ids, mask, cache, self.positions[:, columns])


def padded_columns(columns: int) -> int:
    """The next multiple of 8, which attention kernels ask of a mask."""
    return -(-columns // 8) * 8


@torch.no_grad()
def check_fixed_passes(lm: CausalLM, key: str, device: torch.device) -> None:
    """Check on a few tokens that a model can decode in fixed passes; on a CUDA device, that they can be captured and replayed.

    Call it under the autocast with which the model will generate.

    Args:
        lm: the model.
        key: its YAML key, for messages.
        device: device of the inputs.

    Raises:
        ValueError: with the key, why not, and what to do.
    """
    try:
        with lm.generation_mode():
            fault = _find_fault(lm, device)
    except Exception as error:  # noqa: BLE001 - a model may raise anything
        fault = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if fault is not None:
        raise ValueError(
            f"{key}.cuda_graphs: {type(lm.model).__name__} cannot decode in CUDA graphs: {fault.rstrip('.')}. Remove it."
        )


def _find_fault(lm: CausalLM, device: torch.device) -> str | None:
    """Why hidden states of fixed passes are not those of one pass over the whole texts, or None.

    There are two texts of 12 tokens. The second starts with 5 padding tokens.
    """
    attention = lm.config._attn_implementation
    if attention != "sdpa":
        return f"its attention is {attention}, and only sdpa takes the mask that is needed"
    if not caching_of(lm, device).works:
        return "it has no key-value cache that works"
    ids = (torch.arange(24, device=device) % lm.vocabulary_size).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    whole = read_whole(lm, ids, mask)
    cache = new_cache(lm.config, padded_columns(12))
    if any(type(layer) is not BufferedLayer for layer in cache.layers):
        return "it has layers with a sliding window or a recurrent state"
    lm(ids[:, :6], mask[:, :6], cache)
    passes = FixedPasses(lm, cache, mask, CudaCapture(device) if device.type == "cuda" else lambda work: work)
    found = torch.zeros_like(whole)
    last = torch.zeros(1, dtype=torch.int64, device=device)

    def work(size: int) -> None:
        columns = last + torch.arange(1 - size, 1, device=device)
        found[:, columns] = passes.hidden(ids[:, columns], columns)

    for column, size in ((7, 2), (8, 1), (9, 1), (11, 2)):  # each size twice: as it is, and replayed
        last.fill_(column)
        passes.run(column + 1, size, work)
        replayed = found[:, column + 1 - size : column + 1].clone()
        work(size)
        if not relative_distance(replayed, found[:, column + 1 - size : column + 1]) <= SAME.get(found.dtype, 0.02):
            return "a replay gives other hidden states than the same pass without it"
    if not relative_distance(found[:, 6:], whole[:, 6:]) <= TOLERANCE:
        return "its hidden states differ from those without graphs"
    return None
