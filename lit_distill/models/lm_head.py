"""The LM head of a causal language model, separated from the body so that it can be applied to a few rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.models.lora import head_weight
from lit_distill.models.precision import product_dtype
from lit_distill.models.products import linear
from lit_distill.models.quantization import is_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = {"cpu": 24 * 2**20}
"""Size of one float32 buffer for a chunk's logits, by device type; the default is 128 MB, which keeps a GPU's matrix units busy.
About eight such buffers exist at a time. On a CPU the size stays below 32 MB, because the C library returns larger buffers to the
system instead of reusing them."""

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names under which model configs store the soft cap of the logits."""


class LMHead(NamedTuple):
    """Maps hidden states to logits: ``softcap(scale * (hidden @ weight.T + bias))`` over the common vocabulary."""

    weight: Tensor
    """[V, H]; may be tied to the embedding."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    """The projection is multiplied by it (Cohere, Granite)."""
    softcap: float | None = None
    """Logits are squeezed to (-softcap, softcap) by tanh (Gemma 2, RecurrentGemma, xLSTM)."""

    def project(self, hidden: Tensor) -> Tensor:
        """The projection ``[N, H] -> [N, V]`` without scale and soft cap, in the dtype of ``hidden``; no gradient for the head."""
        bias = None if self.bias is None else self.bias.detach().to(hidden.dtype)
        return linear(hidden, self.weight.detach().to(hidden.dtype), bias)

    def finish(self, projection: Tensor) -> Tensor:
        """Apply scale and soft cap to a projection; ``[N, V]`` float32."""
        logits = projection.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[N, V]`` float32 of hidden rows ``[N, H]``, computed in the head's dtype, without gradient or autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.finish(self.project(hidden.to(self.weight.dtype)))

    def in_compute_dtype(self) -> LMHead:
        """The head without gradient, cast once to autocast's dtype, or in its own dtype if autocast is off."""
        device = self.weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        return self.for_products(dtype)

    def for_products(self, dtype: torch.dtype | None = None) -> LMHead:
        """The head without gradient in ``dtype`` (default: its own), or in float32 if the device emulates that dtype."""
        dtype = product_dtype(dtype or self.weight.dtype, self.weight.device.type)
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return self._replace(weight=self.weight.detach().to(dtype), bias=bias)


def head_of(model: PreTrainedModel, vocabulary_size: int) -> LMHead:
    """The head of a Hugging Face causal language model, cut to the first ``vocabulary_size`` tokens.

    A sharded weight (DTensor) is gathered once per call.
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
            f"The output head of {type(model).__name__} is quantised ({type(weight.data).__name__}), which is not supported. "
            "Exclude it from quantisation: modules_to_not_convert: [lm_head], or the name that this model gives its head."
        )
    softcap = next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None)
    return LMHead(weight, cut(getattr(projection, "bias", None)), scale, softcap)


def chunk_rows_for(head: LMHead) -> int:
    """Default number of rows in a chunk."""
    size = CHUNK_BYTES.get(head.weight.device.type, 128 * 2**20)
    return max(16, size // (4 * len(head.weight)))


@torch.no_grad()
def label_logprobs(
    head: LMHead, hidden: Tensor, labels: Tensor, chunk_rows: int | None = None, temperature: float = 1.0
) -> Tensor:
    """Log-probability of each label, ``[N]`` float32, computed a chunk of rows at a time and without gradient.

    Args:
        head: LM head; applied in its own dtype.
        hidden: ``[N, H]``.
        labels: ``[N]`` int64.
        chunk_rows: rows in a chunk.
        temperature: divides the logits.
    """
    size = chunk_rows or chunk_rows_for(head)
    parts = [slice(i, i + size) for i in range(0, max(len(hidden), 1), size)]

    def scored(part: slice) -> Tensor:
        logits = head.logits(hidden[part])
        return -F.cross_entropy(logits if temperature == 1 else logits / temperature, labels[part], reduction="none")

    return torch.cat([scored(part) for part in parts])
