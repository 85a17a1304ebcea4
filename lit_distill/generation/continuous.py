"""transformers' continuous batching as an engine: a response that ends makes room for the next one, in a paged KV cache.

The engine runs the model that is trained, so there is no second copy of its weights to keep up to date. The project samples the
tokens with the numbers of `row_uniforms`, as `Decoder` does. Afterwards one forward pass gives their log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_distill.generation.base import DecodableModel, Engine
from lit_distill.generation.decoder import ProgressHook
from lit_distill.generation.sampling import SamplingParams, row_uniforms, sample_tokens
from lit_distill.models.lm_head import label_logprobs
from lit_distill.models.spec import load_config
from lit_distill.types import ArgumentError, Prompts, Responses, check_sizes, join_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lit_distill.models import ModelSpec

MINIMUM = (5, 24)
"""The version of transformers whose engine was tested; older ones have no pages of any size, or switch the model's attention."""
PAGED_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""The kinds of layers that the engine has a cache for."""
PAGED_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
"""The attention implementations that the engine runs with."""
SCORED_TOKENS = 16384
"""Tokens, with padding, of one forward pass that scores responses."""
TOLERANCE = {torch.float32: 0.005}
"""Largest mean difference in nats between the log-probabilities of the engine and of the model in the trial; by default 0.3, since
16-bit logits are rounded to a tenth."""


class ContinuousBatching(Engine):
    """Generates with transformers' continuous batching instead of the project's own decoder.

    It is meant for many long responses of different lengths on a GPU with flash attention (``attn_implementation:
    flash_attention_2`` of the model): finished responses leave the batch at every token, new ones take their place, and a common
    beginning of prompts is processed once. With ``sdpa`` or ``eager`` every token is compared with the cache of all responses, so
    many at a time are slow; the own decoder is faster then.

    Sampling is the own decoder's: a response depends on ``seed`` and its key, and equals that of the own decoder unless rounding
    moves a number across the border between two tokens. Bitwise the same responses come again for the same weights, prompts, keys,
    seed and settings where the device computes the same again, as a processor does; in other batches they may be rounded
    differently. Recorded log-probabilities are exact: they come from a forward pass of the model, as in training.

    Args:
        page_size: tokens of a page of the KV cache; by default 256 with flash attention, whose fast kernel for decoding needs
            multiples of it, else 16: masks have a column for every token of every page.
        cache_tokens: tokens of prompts and responses in the cache at a time; further prompts wait. All at once by default.
        batch_tokens: most tokens of one forward pass; a longer prompt is processed in parts.
    """

    def __init__(self, page_size: int | None = None, cache_tokens: int | None = None, batch_tokens: int = 8192) -> None:
        check_sizes(cache_tokens=cache_tokens, batch_tokens=batch_tokens)
        if page_size is not None and page_size < 4:
            raise ValueError(f"page_size: expected at least 4, got {page_size}.")
        self.page_size = page_size
        self.cache_tokens = cache_tokens
        self.batch_tokens = batch_tokens

    def check(self, student: ModelSpec, teacher: ModelSpec | None, sharded: bool) -> None:
        """See `Engine.check`."""
        import transformers

        if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < MINIMUM:
            raise ArgumentError(
                self,
                f"ContinuousBatching needs transformers {'.'.join(map(str, MINIMUM))} or newer, got {transformers.__version__}. "
                "Update it (pip install -U transformers), or remove model.generator.",
            )
        if sharded:
            raise ArgumentError(
                self,
                "ContinuousBatching needs whole models on each device, but trainer.strategy shards them. Set trainer.strategy: "
                "ddp, or remove model.generator.",
            )
        for key, spec in (("student", student), ("teacher", teacher)):
            if spec is not None and not spec.shared_with_student:
                self._check_spec(spec, key)

    def _check_spec(self, spec: ModelSpec, key: str) -> None:
        if spec.compile:
            raise ArgumentError(
                self,
                f"ContinuousBatching cannot run a compiled model, but model.{key}.compile is true. Set it to false, or remove "
                "model.generator.",
            )
        attention = spec.attn_implementation
        if attention is not None and attention.removeprefix("paged|") not in PAGED_ATTENTION:
            raise ArgumentError(
                self,
                f"ContinuousBatching cannot run model.{key}.attn_implementation: {attention}. Set it to one of "
                f"{', '.join(PAGED_ATTENTION)}, or remove model.generator.",
            )
        config = load_config(spec, key)
        self.check_architecture(config, attention or "", f"model.{key}.path: {spec.path}")

    def check_architecture(self, config: PreTrainedConfig, attention: str, name: str) -> None:
        """Refuse layers and attention that the engine does not compute as the model does.

        Args:
            config: of the model.
            attention: its attention implementation; empty if transformers chooses it.
            name: of the model, for messages.

        Raises:
            ArgumentError: with what to do.
        """
        config = config.get_text_config(decoder=True)
        others = sorted(set(getattr(config, "layer_types", None) or ()) - PAGED_LAYERS)
        if others:
            raise ArgumentError(
                self,
                f"ContinuousBatching has no cache for the layers of {name} ({', '.join(others)}). Remove model.generator.",
            )
        if getattr(config, "attn_logit_softcapping", None) and "flash" not in attention:
            raise ArgumentError(
                self,
                f"ContinuousBatching leaves out the attn_logit_softcapping of {name}, unless the model runs with flash attention. "
                "Set its attn_implementation: flash_attention_2, or remove model.generator.",
            )

    def generator(
        self, model: DecodableModel, stop_ids: Sequence[int], on_step: ProgressHook | None = None
    ) -> PagedGenerator:
        """See `Engine.generator`."""
        return PagedGenerator(self, model, stop_ids, on_step)


class PagedGenerator:
    """A `Generator` that runs one model with `ContinuousBatching`.

    Before its first responses it tries the engine on two short texts, since a model may ignore the engine's cache.

    Args:
        engine: the settings.
        model: the model that generates.
        stop_ids: the tokens that end a response.
        on_step: called as by `Decoder`; the step is the share of responses that are finished.
    """

    exact = False
    mixes_teacher = False

    def __init__(
        self,
        engine: ContinuousBatching,
        model: DecodableModel,
        stop_ids: Sequence[int],
        on_step: ProgressHook | None = None,
    ) -> None:
        self.engine = engine
        self.model = model
        self.lm: Any = getattr(model, "lm", model)
        self.stop_ids = stop_ids
        self.on_step = on_step
        self.gap: float | None = None
        """Mean difference in nats between the engine's log-probabilities and the model's, measured in the trial."""

    def sync(self, step: int) -> None:
        """Does nothing: the engine runs the model that is trained, and keeps nothing between two calls."""

    @torch.no_grad()
    def generate(self, prompts: Prompts, keys: Sequence[str], sampling: SamplingParams, seed: int) -> Responses:
        """See `Generator.generate`."""
        if self.gap is None:
            self.gap = self._try_out(prompts.input_ids.device)
        uniforms = None
        if sampling.temperature > 0:
            uniforms = row_uniforms(seed, keys, sampling.max_new_tokens).to(prompts.input_ids.device)
        outputs = self._run(prompts, sampling, uniforms, self.stop_ids, self.on_step)
        responses = _padded([output.generated_tokens for output in outputs], prompts.input_ids.device)
        return self._scored(prompts, responses, sampling.temperature or 1.0)

    def _run(
        self,
        prompts: Prompts,
        sampling: SamplingParams,
        uniforms: Tensor | None,
        stop_ids: Sequence[int],
        on_step: ProgressHook | None,
    ) -> list[Any]:
        from lit_distill.generation.paged import SampleRows, Sizes, generate_paged

        steps, engine = sampling.max_new_tokens, self.engine
        texts = [
            [token for token, real in zip(ids, mask, strict=True) if real] or ids[-1:]
            for ids, mask in zip(prompts.input_ids.tolist(), prompts.attention_mask.tolist(), strict=True)
        ]

        def sample(logits: Tensor, rows: Tensor, at: Tensor) -> Tensor:
            assert uniforms is not None
            return sample_tokens(logits / sampling.temperature, uniforms[rows, at], sampling)

        def report(finished: int) -> None:
            if on_step is not None:
                on_step(steps * finished // len(texts), steps, len(texts) - finished)

        lengths = [len(text) for text in texts]
        page = engine.page_size or (256 if "flash" in self.model.config._attn_implementation else 16)
        sizes = Sizes(page, engine.cache_tokens, engine.batch_tokens)
        vocabulary_size = self.lm.vocabulary_size
        report(0)
        try:
            with self.model.transformers_model(prompts.input_ids.device) as model:
                sampler = SampleRows(lengths, steps, vocabulary_size, None if uniforms is None else sample)
                return generate_paged(model, texts, sampler, stop_ids, sizes, report)
        except RuntimeError as error:
            if "memory" not in str(error).lower():
                raise
            raise ArgumentError(
                engine,
                f"cache_tokens: {len(texts)} prompts with responses of up to {steps} tokens do not fit into memory at once "
                f"({error}). Set it below {engine.cache_tokens or sum(lengths) + steps * len(texts)}.",
            ) from error

    def _scored(self, prompts: Prompts, responses: Responses, temperature: float) -> Responses:
        """The responses with the log-probabilities of their tokens, from one forward pass of prompt and response."""
        sequences = join_prompts(prompts, responses, {})
        rows = max(1, SCORED_TOKENS // sequences.input_ids.shape[1])
        with self.model.generation_mode():
            for first in range(0, len(prompts), rows):
                part, mask = sequences.slice(first, first + rows), responses.mask[first : first + rows]
                hidden, labels = self.model.target_rows(part), responses.ids[first : first + rows][mask]
                values = label_logprobs(self.model.decoding_head(), hidden, labels, temperature=temperature)
                responses.logprobs[first : first + rows][mask] = values
        return responses

    def _try_out(self, device: torch.device) -> float:
        """Compare the engine's log-probabilities with the model's on a few greedy tokens.

        Raises:
            ArgumentError: if the engine cannot run the model, or its log-probabilities differ.
        """
        lm = self.lm
        attention = lm.config._attn_implementation
        name = f"{type(lm.model).__name__} ({attention} attention)"
        self.engine.check_architecture(lm.config, attention, name)
        ids = torch.arange(16, device=device).view(2, 8) % lm.vocabulary_size
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        prompts, sampling = Prompts(ids, mask), SamplingParams(max_new_tokens=6, temperature=0.0)
        try:
            outputs = self._run(prompts, sampling, None, (), None)
        except Exception as error:  # a model may raise anything
            raise ArgumentError(
                self.engine, f"ContinuousBatching cannot run {name}: {error}. Remove model.generator."
            ) from error
        responses = self._scored(prompts, _padded([output.generated_tokens for output in outputs], device), 1.0)
        theirs = torch.tensor([output.logprobs for output in outputs], device=device)
        gap = float((theirs - responses.logprobs).abs().mean())
        dtype = next(lm.parameters()).dtype
        limit = 0.3 if torch.is_autocast_enabled(device.type) else TOLERANCE.get(dtype, 0.3)
        if not gap <= limit:  # NaN fails too
            raise ArgumentError(
                self.engine,
                f"ContinuousBatching computes other log-probabilities than {name} itself: they differ by {gap:.3g} on average. "
                "Set another attn_implementation of that model, or remove model.generator.",
            )
        return gap


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Responses:
    """Responses of these tokens, with log-probabilities of 0."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64, device=device)
    mask = torch.arange(width, device=device) < lengths[:, None]
    return Responses(ids, mask, torch.zeros(ids.shape, dtype=torch.float32, device=device))
