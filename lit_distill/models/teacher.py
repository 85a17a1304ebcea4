"""The frozen teacher: no gradient, no dropout, its own dtype, and in no checkpoint and no optimiser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_distill.models.lora import switched_off, switches_of
from lit_distill.models.precision import forward_only
from lit_distill.models.sharding import forget_forwards, is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
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
        shared: it is the student, and the teacher is what it was before its adapters: those are off while the teacher speaks,
            and on at all other times.
    """

    def __init__(self, lm: CausalLM, shared: bool = False) -> None:
        self.lm = lm if shared else lm.eval().requires_grad_(False)
        self.shared = shared
        self._switches = switches_of(lm) if shared else []

    @contextmanager
    def _as_itself(self, device_type: str) -> Iterator[None]:
        """Without gradient; where the student's weights are shared, also without its adapters and its dropout."""
        quiet = self.lm.quiet() if self.lm.training else nullcontext()
        with quiet, switched_off(self._switches), forward_only(device_type):
            yield

    def _follow(self, inputs: Tensor) -> None:
        """Go where the inputs are: Lightning moves only what it knows of."""
        if not is_sharded(self.lm) and next(self.lm.parameters()).device != inputs.device:
            self.lm.to(inputs.device)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states ``[B, S, H]``, in the teacher's own dtype whatever the student's precision is; see `CausalLM.forward`."""
        self._follow(input_ids)
        with torch.autocast(input_ids.device.type, enabled=False), self._as_itself(input_ids.device.type):
            hidden: Tensor = self.lm(input_ids, attention_mask, cache)
        forget_forwards(self.lm)
        return hidden

    @torch.no_grad()
    def target_rows(self, sequences: Sequences) -> Tensor:
        """Hidden rows ``[N, H]`` for the N targets."""
        self._follow(sequences.input_ids)
        device_type = sequences.input_ids.device.type
        with torch.autocast(device_type, enabled=False), self._as_itself(device_type):
            rows = self.lm.target_rows(sequences)
        forget_forwards(self.lm)
        return rows

    def head(self) -> Head:
        """The teacher's output projection over the common vocabulary, in its own dtype where the device multiplies that fast."""
        with switched_off(self._switches):
            return self.lm.head().for_products()

    decoding_head = head

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config."""
        return self.lm.config

    @property
    def partners(self) -> ProcessGroup | None:
        """See `CausalLM`."""
        return self.lm.partners

    @property
    def runs_together(self) -> bool:
        """See `CausalLM`."""
        return self.lm.runs_together

    def speaking(self) -> AbstractContextManager[None]:
        """See `CausalLM`."""
        return self.lm.speaking()
