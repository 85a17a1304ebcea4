"""The output projection of a causal language model, taken apart so that it can be applied to a few rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.models.lora import head_weight
from lit_distill.models.precision import product_dtype
from lit_distill.models.quantized import is_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configs call the bound of their logits."""


class Head(NamedTuple):
    """Hidden rows to logits: ``softcap(scale * (hidden @ weight.T + bias))`` over the common vocabulary."""

    weight: Tensor
    """[V, H], perhaps the embedding itself."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    """Factor of the projection (Cohere, Granite)."""
    softcap: float | None = None
    """Logits are squeezed to (-softcap, softcap) by tanh (Gemma 2, RecurrentGemma, xLSTM)."""

    def project(self, hidden: Tensor) -> Tensor:
        """The bare projection ``[N, H] -> [N, V]`` in the dtype of ``hidden``, without gradient to the head."""
        bias = None if self.bias is None else self.bias.detach().to(hidden.dtype)
        return F.linear(hidden, self.weight.detach().to(hidden.dtype), bias)

    def finish(self, projection: Tensor) -> Tensor:
        """Scale and soft-capping of a projection, ``[N, V]`` float32."""
        logits = projection.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[N, V]`` float32 of hidden rows ``[N, H]``, in the dtype the head is held in, without gradient or autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.finish(self.project(hidden.to(self.weight.dtype)))

    def in_compute_dtype(self) -> Head:
        """The same head, without gradient, in the dtype that autocast asks for or its own: cast once, applied many times."""
        device = self.weight.device.type
        asked = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        return self.for_products(asked)

    def for_products(self, dtype: torch.dtype | None = None) -> Head:
        """The same head, without gradient, in ``dtype`` or its own; in float32 where products of that would be emulated."""
        dtype = product_dtype(dtype or self.weight.dtype, self.weight.device.type)
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return self._replace(weight=self.weight.detach().to(dtype), bias=bias)


def head_of(model: PreTrainedModel, vocabulary_size: int) -> Head:
    """The head of a Hugging Face causal language model, cut to the first ``vocabulary_size`` tokens.

    A sharded weight (DTensor) is gathered here, once per call.
    """
    config = model.config.get_text_config()
    projection = model.get_output_embeddings()

    def cut(parameter: Tensor | None) -> Tensor | None:
        if parameter is None:
            return None
        full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        return full if len(full) == vocabulary_size else full[:vocabulary_size]

    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scaling = getattr(config, "logits_scaling", None)
    if scaling:  # Granite divides, HyperCLOVA X multiplies
        scale = 1.0 / scaling if config.model_type.startswith("granite") else scaling
    weight = cut(head_weight(projection))
    assert weight is not None
    if not is_plain(weight):
        raise ValueError(
            f"The output head of {type(model).__name__} is quantised ({type(weight.data).__name__}), and it is applied here to a "
            "few rows at a time. Leave it as it is: modules_to_not_convert: [lm_head], or with the names that the model has."
        )
    softcap = next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None)
    return Head(weight, cut(getattr(projection, "bias", None)), scale, softcap)
