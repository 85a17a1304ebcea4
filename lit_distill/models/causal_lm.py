"""A Hugging Face causal language model as a body and a head; the one place that shifts hidden states to targets."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_distill.models.caching import Caching, only_recurrent
from lit_distill.models.head import Head, head_of
from lit_distill.models.precision import forward_only
from lit_distill.models.sharding import gather_ends, held_whole, is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache

    from lit_distill.types import Sequences


CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What a body's forward may call its key-value cache: the first since transformers 5.24, the second before and in models from
elsewhere."""


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
        self.gathers = False
        """Whether a sharded model is gathered once to write text, rather than for each token."""
        self.partners: ProcessGroup | None = None
        """The ranks that have the same items and run each block of this model together; None where each rank runs it by itself."""
        self._whole = False
        self.base_fingerprint: int | None = None
        """See `lora.fingerprint`: noted where the weights under adapters are sharded, and no longer to be looked at as one."""
        self.caching: Caching | None = None
        """See `caching_of`, which finds it out."""
        taken = inspect.signature(model.base_model.forward).parameters
        self._takes_positions = "position_ids" in taken
        self._cache_argument = next((name for name in CACHE_ARGUMENTS if name in taken), None)
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
        if cache is not None and only_recurrent(cache):  # nothing attends to what was read before
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        output = self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=cache is not None,
            **({} if self._cache_argument is None else {self._cache_argument: cache}),
            **positions,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def target_rows(self, sequences: Sequences) -> Tensor:
        """The hidden rows ``[N, H]`` that predict the N targets of ``sequences``, in their order."""
        hidden = self(sequences.input_ids, sequences.attention_mask)
        return hidden[:, :-1][sequences.target_mask[:, 1:]]

    def head(self) -> Head:
        """The output projection over the common vocabulary; where it is sharded, a collective that gathers it.

        It is good until the backward through it, or, without gradient, until the next optimiser step.
        """
        gather_ends(self)
        return head_of(self.model, self.vocabulary_size)

    def decoding_head(self) -> Head:
        """The head without gradient, cast once to the dtype it will be applied in many times."""
        return self.head().in_compute_dtype()

    @property
    def takes_cache(self) -> bool:
        """Whether the body can be handed a cache."""
        return self._cache_argument is not None

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

    @property
    def runs_together(self) -> bool:
        """Whether each forward is a collective: sharded, and not gathered for a while."""
        return is_sharded(self) and not self._whole

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Quiet while text is being written, and, where `gathers` says so, whole: then ranks need not wait for each other."""
        hold = self.gathers and self.runs_together
        device_type = self.model.device.type
        whole = held_whole(self) if hold else nullcontext()
        with self.quiet(), whole, _weights_cast_once(device_type), forward_only(device_type):
            self._whole |= hold
            try:
                yield
            finally:
                self._whole &= not hold


@contextmanager
def _weights_cast_once(device: str) -> Iterator[None]:
    """Let autocast keep its copies of weights, which do not change while text is written; Lightning's casts them for each token."""
    if not torch.is_autocast_enabled(device):
        yield
        return
    torch.clear_autocast_cache()
    with torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=True):
        try:
            yield
        finally:
            torch.clear_autocast_cache()


@torch.no_grad()
def check_head(lm: CausalLM, key: str, device: torch.device | None = None) -> None:
    """Compare the model's own logits with its head applied to its body, on a few tokens; a collective if it is sharded.

    Args:
        lm: the model.
        key: its YAML key, for messages.
        device: where its inputs go; by default where its weights are.

    Raises:
        ValueError: if the model does something to its logits that `Head` does not know, or does not read from left to right.
    """
    model = lm.model
    ids = torch.arange(8, device=device or model.device).repeat(3, 1) % lm.vocabulary_size
    mask = torch.ones_like(ids)
    ids[1, 5:] = ids[0, :3]  # another text that begins alike, and the beginning with padding
    ids[2, 5:], mask[2, 5:] = 0, 0
    with lm.quiet():  # ours first: the forward of a sharded model begins with its outermost module
        hidden = lm(ids, mask)
        ours, *begun_alike = lm.head().logits(hidden.flatten(0, 1)).view(3, 8, -1)
        own = model(input_ids=ids[:1], attention_mask=mask[:1], use_cache=False).logits[0].float()
        own = own[:, : lm.vocabulary_size]
    tolerance = 2e-3 if hidden.dtype == torch.float32 else 0.05  # a soft cap far above the logits changes them little
    if not torch.allclose(own, ours, rtol=tolerance, atol=tolerance * float(own.abs().max())):
        raise ValueError(
            f"{key}.path: {type(model).__name__} does something to its logits beyond bias, scale and soft-capping "
            f"(they differ by up to {float((own - ours).abs().max()):.3g} from the head applied to the body). "
            "Such a model is not supported."
        )
    distances = [(other - ours)[:5].norm(dim=-1) / ours[:5].norm(dim=-1).clamp(min=1e-9) for other in begun_alike]
    if max(float(distance.mean()) for distance in distances) > 0.05:
        raise ValueError(
            f"{key}.path: what {type(model).__name__} computes of a text depends on the tokens or the padding after it, so it does "
            "not read from left to right. Such a model is not supported."
        )
