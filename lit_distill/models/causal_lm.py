"""A Hugging Face causal language model as a body and a head; the one place that shifts hidden states to targets."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_distill.models.head import Head, head_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache

    from lit_distill.types import Sequences


class CausalLM(nn.Module):
    """A decoder whose logits are never computed for more tokens than somebody asks for.

    Args:
        model: a `transformers` causal language model.
        vocabulary_size: V, how many tokens it shares with its partner; defaults to all rows of its head.
        compile_body: run the body through `torch.compile`.
    """

    def __init__(self, model: PreTrainedModel, vocabulary_size: int | None = None, compile_body: bool = False) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.vocabulary_size = vocabulary_size or model.get_output_embeddings().weight.shape[0]
        self._takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
        if compile_body:
            model.base_model.compile(dynamic=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states that predict the token after each input token.

        Args:
            input_ids: ``[B, S]``, the tokens that are not in the cache yet.
            attention_mask: ``[B, C + S]``, over cached and new tokens; padding may stand on either side.
            cache: keys and values of the first C tokens, extended in place.

        Returns:
            ``[B, S, H]`` in the body's dtype.
        """
        positions = {}
        if self._takes_positions:  # counted from the first real token, so that padding on the left changes nothing
            position_ids = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
            positions["position_ids"] = position_ids[:, -input_ids.shape[1] :]
        output = self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **positions,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def target_rows(self, sequences: Sequences) -> Tensor:
        """The hidden rows ``[N, H]`` that predict the N targets of ``sequences``, in their order."""
        hidden = self(sequences.input_ids, sequences.attention_mask)
        return hidden[:, :-1][sequences.target_mask[:, 1:]]

    def head(self) -> Head:
        """The output projection over the common vocabulary; gathered if it is sharded."""
        return head_of(self.model, self.vocabulary_size)

    def decoding_head(self) -> Head:
        """The head without gradient, cast once to the dtype it will be applied in many times."""
        return self.head().in_compute_dtype()

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config."""
        return self.model.config

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Evaluation mode for a while: without dropout, and with a key-value cache where gradient checkpointing forbids one."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)


@torch.no_grad()
def check_head(model: PreTrainedModel, key: str) -> None:
    """Compare the model's own logits with its head applied to its body, on a few tokens.

    Raises:
        ValueError: if the model does something to its logits that `Head` does not know.
    """
    parts = CausalLM(model)
    was_training = model.training
    model.eval()
    device = model.get_output_embeddings().weight.device
    ids = torch.arange(8, device=device)[None] % parts.vocabulary_size
    mask = torch.ones_like(ids)
    own = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
    ours = parts.head().logits(parts(ids, mask)[0])
    model.train(was_training)
    if not torch.allclose(own, ours, rtol=0.05, atol=0.05 * float(own.abs().max())):
        raise ValueError(
            f"{key}.path: {type(model).__name__} does something to its logits beyond bias, scale and soft-capping "
            f"(they differ by up to {float((own - ours).abs().max()):.3g} from the head applied to the body). "
            "Such a model is not supported."
        )
