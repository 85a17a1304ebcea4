"""The frozen teacher: no gradient, no dropout, its own dtype, and in no checkpoint and no optimiser."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_distill.models.sharding import forget_forwards, is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

    from lit_distill.models.causal_lm import CausalLM
    from lit_distill.models.head import Head
    from lit_distill.types import Sequences


class FrozenTeacher:
    """A causal language model that is only listened to.

    It is deliberately no `nn.Module`: an attribute of a LightningModule that is none is not saved, optimised,
    broadcast, set to training mode or converted by a precision plugin.

    Args:
        lm: the model; its parameters stop requiring gradients.
    """

    def __init__(self, lm: CausalLM) -> None:
        self.lm = lm.eval().requires_grad_(False)

    def _follow(self, inputs: Tensor) -> None:
        """Go where the inputs are: Lightning moves only what it knows of."""
        if not is_sharded(self.lm) and next(self.lm.parameters()).device != inputs.device:
            self.lm.to(inputs.device)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states ``[B, S, H]``, in the teacher's own dtype whatever the student's precision is; see `CausalLM.forward`."""
        self._follow(input_ids)
        with torch.autocast(input_ids.device.type, enabled=False):
            hidden: Tensor = self.lm(input_ids, attention_mask, cache)
        forget_forwards(self.lm)
        return hidden

    @torch.no_grad()
    def target_rows(self, sequences: Sequences) -> Tensor:
        """Hidden rows ``[N, H]`` for the N targets."""
        self._follow(sequences.input_ids)
        with torch.autocast(sequences.input_ids.device.type, enabled=False):
            rows = self.lm.target_rows(sequences)
        forget_forwards(self.lm)
        return rows

    def head(self) -> Head:
        """The teacher's output projection over the common vocabulary."""
        return self.lm.head()

    decoding_head = head

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config."""
        return self.lm.config

    @property
    def runs_together(self) -> bool:
        """See `CausalLM`."""
        return self.lm.runs_together

    def speaking(self) -> AbstractContextManager[None]:
        """See `CausalLM`."""
        return self.lm.speaking()
