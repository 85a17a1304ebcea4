"""A Hugging Face causal language model, split into a body and an LM head. Only this module aligns hidden states with targets."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from lit_distill.models.caching import Caching, only_recurrent, relative_distance
from lit_distill.models.fsdp import is_sharded, unshard_root, unsharded
from lit_distill.models.lm_head import LMHead, head_of
from lit_distill.models.precision import forward_only, product_dtype, weights_in

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache

    from lit_distill.types import Sequences


Packs = Literal["rows", "one row"]
"""How texts may be packed: into several rows, or all into one."""
CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Names of the KV cache argument of the body's forward: the first since transformers 5.24, the second before and in custom code."""


class CausalLM(nn.Module):
    """A causal language model that computes logits only for the requested tokens.

    Args:
        model: a `transformers` causal language model.
        vocabulary_size: V, the number of tokens that student and teacher share; defaults to all rows of the head.
        compile_body: run the body through `torch.compile`.
    """

    def __init__(self, model: PreTrainedModel, vocabulary_size: int | None = None, compile_body: bool = False) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.vocabulary_size = vocabulary_size or model.get_output_embeddings().weight.shape[0]
        self.unshard_for_generation = False
        """Whether a sharded model is gathered once for a whole generation, instead of for each token."""
        self.tensor_parallel_group: ProcessGroup | None = None
        """The ranks that process the same examples and compute each block together; None without tensor parallelism."""
        self._is_unsharded = False
        self.base_fingerprint: int | None = None
        """Result of `lora.fingerprint`, stored before the base weights are sharded; None if they are not."""
        self.caching: Caching | None = None
        """Set by `caching_of` at its first call."""
        self.cuda_graphs = False
        """Whether the steps of decoding are captured as CUDA graphs; see `FixedPasses`."""
        self.packs: Packs | None = None
        """How texts are packed for training, set by `check_packing`; None pads them."""
        taken = inspect.signature(model.base_model.forward).parameters
        self.takes_positions = "position_ids" in taken
        self._cache_argument = next((name for name in CACHE_ARGUMENTS if name in taken), None)
        self.compiled = compile_body
        """Whether the body, or each block of a sharded one, runs through `torch.compile` where no cache grows."""
        if compile_body:
            model.base_model.compile(dynamic=True)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states from which the token after each input token is predicted.

        Args:
            input_ids: ``[B, S]``, the tokens that are not in the cache yet.
            attention_mask: ``[B, C + S]``, over cached and new tokens; padding on either side. None for packed rows. Or
                ``[B, 1, S, C']``, of the cached tokens that each new one attends to, with ``position_ids``.
            cache: keys and values of the first C tokens, extended in place.
            position_ids: ``[B, S]``; by default counted from the first token that is not padding.

        Returns:
            ``[B, S, H]`` in the body's dtype.
        """
        positions = {} if position_ids is None else {"position_ids": position_ids}
        if attention_mask is not None and self.takes_positions and position_ids is None:
            # counted from the first real token, so that left padding changes nothing
            counted = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
            positions["position_ids"] = counted[:, -input_ids.shape[1] :]
        if (
            attention_mask is not None and cache is not None and only_recurrent(cache)
        ):  # no layer attends to cached tokens
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
        packed = None
        if self.packs is not None:
            packed = sequences.packed if self.packs == "rows" else sequences.packed_in_one_row
            if packed is not None and self.packs == "rows" and packed.input_ids.shape[1] > self.context_length:
                packed = None  # some models have a causal mask of their context length
        if packed is None:
            hidden = self(sequences.input_ids, sequences.attention_mask)
            return hidden.flatten(0, 1)[sequences.target_index - 1]
        hidden = self(packed.input_ids, None, position_ids=packed.position_ids)
        return hidden.flatten(0, 1)[sequences.packed_index(packed)]

    def head(self) -> LMHead:
        """The LM head over the common vocabulary; a collective that gathers it if the model is sharded.

        It is valid until its backward pass or, without gradient, until the next optimiser step.
        """
        unshard_root(self)
        return head_of(self.model, self.vocabulary_size)

    def decoding_head(self) -> LMHead:
        """The head without gradient, cast once to the dtype in which it is applied for every token."""
        return self.head().in_compute_dtype()

    @property
    def takes_cache(self) -> bool:
        """Whether the body's forward has a cache argument."""
        return self._cache_argument is not None

    @property
    def context_length(self) -> float:
        """The longest row that the model takes; infinite if its config names none."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None) or math.inf

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config."""
        return self.model.config

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Evaluation mode inside the context: no dropout, and a KV cache, which gradient checkpointing forbids in training."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    @property
    def forward_is_collective(self) -> bool:
        """Whether each forward is a collective: the model is sharded and not gathered at the moment."""
        return is_sharded(self) and not self._is_unsharded

    @contextmanager
    def generation_mode(self) -> Iterator[None]:
        """Evaluation mode for generation. With `unshard_for_generation` the model is gathered, so that ranks need not wait.

        A compiled model runs as it is: the compiler takes no cache that is extended in place.
        """
        unshard = self.unshard_for_generation and self.forward_is_collective
        device_type = self.model.device.type
        gathered = unsharded(self) if unshard else nullcontext()
        as_it_is = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with as_it_is, self.eval_mode(), gathered, _cached_weight_casts(device_type), forward_only(device_type):
            self._is_unsharded |= unshard
            try:
                yield
            finally:
                self._is_unsharded &= not unshard

    @contextmanager
    def transformers_model(self, device: torch.device) -> Iterator[PreTrainedModel]:
        """The model itself in generation mode, for code of transformers that generates.

        Such code may run in a thread, where autocast is off. So under mixed precision the model has 16-bit copies of its weights.
        """
        mixed = torch.is_autocast_enabled(device.type)
        dtype = product_dtype(torch.get_autocast_dtype(device.type), device.type) if mixed else None
        with self.generation_mode(), weights_in(self.model, dtype):
            yield self.model


@contextmanager
def _cached_weight_casts(device: str) -> Iterator[None]:
    """Let autocast cache its casts of the weights during generation; Lightning's autocast would repeat them for each token."""
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
    """Check on a few tokens that body and `LMHead` give the model's own logits, and that it is causal; a collective if sharded.

    Args:
        lm: the model.
        key: its YAML key, for messages.
        device: device of the inputs; by default that of the weights.

    Raises:
        ValueError: if the model changes its logits in a way that `LMHead` does not support, or is not causal.
    """
    model = lm.model
    ids = torch.arange(8, device=device or model.device).repeat(3, 1) % lm.vocabulary_size
    mask = torch.ones_like(ids)
    ids[1, 5:] = ids[0, :3]  # row 1 has the same prefix and another end; row 2 the prefix and padding
    ids[2, 5:], mask[2, 5:] = 0, 0
    with lm.eval_mode():  # ours first: a sharded model's first forward must start at its outermost module
        hidden = lm(ids, mask)
        ours, *same_prefix = lm.head().logits(hidden.flatten(0, 1)).view(3, 8, -1)
        own = model(input_ids=ids[:1], attention_mask=mask[:1], use_cache=False).logits[0].float()
        own = own[:, : lm.vocabulary_size]
    tolerance = (
        2e-3 if hidden.dtype == torch.float32 else 0.05
    )  # tight: a soft cap far above the logits changes them little
    if not torch.allclose(own, ours, rtol=tolerance, atol=tolerance * float(own.abs().max())):
        raise ValueError(
            f"{key}.path: {type(model).__name__} changes its logits by more than bias, scale and soft-capping "
            f"(they differ by up to {float((own - ours).abs().max()):.3g} from the head applied to the body). "
            "Such a model is not supported."
        )
    if max(relative_distance(other[:5], ours[:5]) for other in same_prefix) > 0.05:
        raise ValueError(
            f"{key}.path: {type(model).__name__} is not causal: its output depends on the tokens or the padding after a text. "
            "Such a model is not supported."
        )
