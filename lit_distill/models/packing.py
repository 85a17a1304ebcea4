"""Whether a model keeps texts apart that are packed into one row; tried on the model itself, before training."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_distill.models.caching import TOLERANCE, relative_distance
from lit_distill.models.causal_lm import CausalLM, Packs
from lit_distill.types import Sequences

WAYS: tuple[Packs, ...] = ("rows", "one row")
SIZES = (9, 5, 6, 3)
"""Tokens of the texts that are tried; they fit into two rows."""


@torch.no_grad()
def check_packing(lm: CausalLM, key: str, device: torch.device) -> None:
    """Let the model pack texts if they then have the hidden states that they have alone; a collective if it is sharded.

    transformers keeps texts apart by their positions, which begin anew with each: in any row for eager, SDPA and flex attention,
    in a batch of one row for flash attention, and for recurrent layers not at all. Otherwise one line says that batches are padded.

    Args:
        lm: the model; `CausalLM.packs` is set.
        key: the argument that gives it, for the message.
        device: device of the inputs.
    """
    if lm.takes_positions:
        for way in WAYS:
            lm.packs = way
            if _keeps_apart(lm, device):
                return
    lm.packs = None
    kind, attention = type(lm.model).__name__, getattr(lm.config, "_attn_implementation", None)
    rank_zero_info(f"model.{key}: {kind} ({attention} attention) mixes texts of one row, so batches are padded.")


def _keeps_apart(lm: CausalLM, device: torch.device) -> bool:
    texts = _texts(lm, device, shift=0)
    other = _texts(lm, device, shift=1)  # only the first text is the same
    way, count = lm.packs, SIZES[0] - 1
    with lm.eval_mode():
        packed, beside_others = lm.target_rows(texts), lm.target_rows(other)
        lm.packs = None
        padded = lm.target_rows(texts)
        lm.packs = way
    if packed.dtype == torch.float32:
        close = float((packed - padded).abs().amax()) <= 1e-4 * float(padded.abs().amax())
    else:  # rounded otherwise by kernels for other shapes: of a real model in bfloat16, some rows by as much as they are long
        close = relative_distance(packed, padded) <= TOLERANCE
    return close and torch.equal(packed[:count], beside_others[:count])


def _texts(lm: CausalLM, device: torch.device, shift: int) -> Sequences:
    columns = torch.arange(max(SIZES), device=device)
    attended = columns < torch.tensor(SIZES, device=device)[:, None]
    ids: Tensor = 3 + columns.repeat(len(SIZES), 1)
    ids[1:] += torch.arange(1, len(SIZES), device=device)[:, None] + 7 * shift
    targets = attended.clone()
    targets[:, 0] = False
    return Sequences(ids % lm.vocabulary_size * attended, attended.long(), targets)
