"""P6: responses of different lengths, against transformers' `generate` and its continuous batching.

Every way samples at temperature 1 and ends row r at a length that is given, with hardly any work for it: ours by the random numbers
of the rows (the stop token is the last of the vocabulary: a number just below 1 takes it, smaller numbers do not), `generate` by a
logits processor that writes a few numbers, continuous batching by the longest length of each request.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from gpu_checks.speed import QWEN_HALF
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList

from benchmarks.measure import Bench, alternate, counted
from benchmarks.models import causal_lm, qwen_config, random_prompts, smol_config, tiny_config
from benchmarks.results import Result, at_least, compared, skipped
from lit_distill.generation import SamplingParams, generate, row_uniforms
from lit_distill.models import CausalLM
from lit_distill.types import Prompts


def forced_uniforms(lengths: Tensor) -> Tensor:
    """``[B, longest]`` float64 numbers that end row r with the last token of the vocabulary at ``lengths[r]``, and not before."""
    uniforms = 0.98 * row_uniforms(0, [str(row) for row in range(len(lengths))], int(lengths.max()))
    uniforms[torch.arange(len(lengths)), lengths - 1] = 1 - 1e-9
    return uniforms


class ForcedLengths(LogitsProcessor):
    """Lets row r end at ``lengths[r]`` with the ``stop`` token, and at no other step.

    Args:
        lengths: ``[B]`` int64 on the host.
        stop: the token.
        prompt_width: P.
        device: of the scores.
    """

    def __init__(self, lengths: Tensor, stop: int, prompt_width: int, device: torch.device) -> None:
        self.stop = stop
        self.prompt_width = prompt_width
        steps = (lengths - 1).tolist()
        self.ending = {
            step: torch.tensor([row for row, last in enumerate(steps) if last == step], device=device)
            for step in set(steps)
        }

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores ``[B, V]``, changed in place."""
        scores[:, self.stop] = -torch.inf
        rows = self.ending.get(input_ids.shape[1] - self.prompt_width)
        if rows is not None:
            scores[rows] = -torch.inf
            scores[rows, self.stop] = 0.0
        return scores


class Ways:
    """The three ways to generate the same numbers of tokens.

    Args:
        bench: device.
        lm: the model.
        prompts: ``[B, P]``, of one length.
        lengths: ``[B]`` tokens of each response, with the stop token.
    """

    def __init__(self, bench: Bench, lm: CausalLM, prompts: Prompts, lengths: Tensor) -> None:
        self.bench = bench
        self.lm = lm
        self.prompts = prompts
        self.lengths = lengths
        self.longest = int(lengths.max())
        self.stop = lm.vocabulary_size - 1
        self.uniforms = forced_uniforms(lengths)

    def ours(self) -> list[int]:
        """The project's decoder; returns the lengths."""
        with self.bench.machine.autocast(self.bench.precision):
            responses = generate(self.lm, self.prompts, SamplingParams(self.longest), (self.stop,), self.uniforms)
        return responses.mask.sum(dim=-1).tolist()

    def transformers(self) -> list[int]:
        """Transformers' ``generate``; returns the lengths."""
        width = self.prompts.input_ids.shape[1]
        forced = ForcedLengths(self.lengths, self.stop, width, self.bench.machine.device)
        settings = GenerationConfig(
            do_sample=True, top_k=0, top_p=1.0, max_new_tokens=self.longest, eos_token_id=self.stop, pad_token_id=0
        )
        with torch.no_grad(), self.bench.machine.autocast(self.bench.precision):
            model: Any = self.lm.model
            texts = model.generate(
                input_ids=self.prompts.input_ids,
                attention_mask=self.prompts.attention_mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([forced]),
            )
        ended = texts[:, width:] == self.stop
        return (ended.int().argmax(dim=-1) + 1).tolist()

    def continuous(self) -> list[int]:
        """Transformers' continuous batching; returns the lengths."""
        settings = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)
        page = 16
        blocks = sum(-(-(self.prompts.input_ids.shape[1] + length) // page) for length in self.lengths.tolist())
        sizes = ContinuousBatchingConfig(
            page_size=page, num_blocks=blocks, max_batch_tokens=max(16, self.prompts.input_ids.numel())
        )
        found: dict[str, int] = {}
        engine: Any = self.lm.model
        attention = engine.config._attn_implementation
        try:
            with (
                torch.no_grad(),
                engine.continuous_batching_context_manager(
                    generation_config=settings, continuous_batching_config=sizes, block=True, timeout=5, warmup=False
                ) as manager,
            ):
                requests = zip(self.prompts.input_ids.tolist(), self.lengths.tolist(), strict=True)
                for row, (prompt, length) in enumerate(requests):
                    manager.add_request(prompt, request_id=str(row), max_new_tokens=length, eos_token_id=-1)
                while len(found) < len(self.lengths):
                    output = manager.get_result(timeout=1)
                    if output is None and not manager.is_running():
                        raise RuntimeError("its thread has ended")
                    if output is not None and output.is_finished():
                        found[output.request_id] = len(output.generated_tokens)
        finally:
            if engine.config._attn_implementation != attention:
                engine.set_attn_implementation(attention)
        return [found[str(row)] for row in range(len(self.lengths))]


def lengths_between(rows: int, shortest: int, longest: int) -> Tensor:
    """``[rows]`` int64 lengths from the shortest to the longest, evenly spaced, in a fixed random order."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return torch.linspace(shortest, longest, rows).round().long()[order]


def decoding(bench: Bench) -> Iterator[Result]:
    """Responses of 8 to 128 tokens."""
    rows, columns, shortest, longest = bench.size((4, 8, 2, 16), (16, 32, 8, 128), (64, 32, 8, 128))
    config = bench.size(tiny_config(2), smol_config(30), qwen_config(QWEN_HALF))
    # on CUDA the weights are 16-bit, as the engine takes no autocast
    lm = causal_lm(bench, config, 0, bench.teacher_dtype)
    prompts = random_prompts(bench, lm.vocabulary_size, rows, columns)
    lengths = lengths_between(rows, shortest, longest)
    ways = Ways(bench, lm, prompts, lengths)
    size = f"{rows} responses of {shortest} to {longest} tokens"
    peers = {"transformers' generate": ways.transformers, "transformers' continuous batching": ways.continuous}
    ours_note = _checked(ways.ours, lm, lengths)
    for name, way in peers.items():
        what = f"{size}, against {name}"
        try:
            note = _checked(way, lm, lengths)
        except Exception as error:
            if way == ways.transformers:
                raise
            yield skipped(what, f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}")
            continue
        seconds = alternate({"ours": bench.clock(ways.ours), name: bench.clock(way)}, bench.repeats, warm_up=False)
        yield compared(what, seconds["ours"], seconds[name], at_least(1.5), f"ours: {ours_note}. peer: {note}")


def _checked(way: Any, lm: CausalLM, lengths: Tensor) -> str:
    """Run a way once, for its warm-up; returns its work."""
    with counted({"model": lm}) as counts:
        found = way()
    if found != lengths.tolist():
        raise RuntimeError(f"responses of {found} tokens instead of {lengths.tolist()}")
    return str(counts)
