"""P2: teacher-mixed rollouts against a student that generates alone and a teacher that reads its texts once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from gpu_checks.speed import GIB, NEEDED

from benchmarks.measure import Bench, alternate, counted, warm_up
from benchmarks.models import Pair, causal_lm, pair_of, random_prompts, smol_config, tiny_config
from benchmarks.results import Result, at_least, at_most, compared, skipped
from lit_distill.generation import SamplingParams, generate, generate_mixed, row_uniforms
from lit_distill.teachers import FrozenTeacher
from lit_distill.types import Prompts, join_prompts

ALPHA = 0.2


class Rollouts:
    """One pair, its prompts, and the ways to generate with it.

    Args:
        bench: device.
        pair: both models.
        prompts: ``[B, P]``.
        new_tokens: T, of every response.
    """

    def __init__(self, bench: Bench, pair: Pair, prompts: Prompts, new_tokens: int) -> None:
        self.bench = bench
        self.pair = pair
        self.prompts = prompts
        self.sampling = SamplingParams(new_tokens)
        self.uniforms = row_uniforms(0, [str(row) for row in range(len(prompts))], new_tokens)
        coins = torch.rand(new_tokens, generator=torch.Generator().manual_seed(0))
        self.use_teacher = (coins < ALPHA).tolist()

    def mixed(self) -> None:
        """Ours: both models sample, and both models' log-probabilities are recorded."""
        with self.bench.machine.autocast(self.bench.precision):
            generate_mixed(
                self.pair.student, self.pair.teacher, self.use_teacher, self.prompts, self.sampling, (), self.uniforms,
                entropies=False,
            )  # fmt: skip

    def without_graphs(self) -> None:
        """The same as `student_alone`, each step started from Python."""
        graphs, self.pair.student.cuda_graphs = self.pair.student.cuda_graphs, False
        self.student_alone()
        self.pair.student.cuda_graphs = graphs

    def student_alone(self) -> None:
        """The project's decoder, with the student alone; on CUDA by CUDA graphs."""
        with self.bench.machine.autocast(self.bench.precision):
            generate(self.pair.student, self.prompts, self.sampling, (), self.uniforms)

    def apart(self) -> None:
        """The student alone, then one forward pass of the teacher: its hidden rows, and the labels' log-probabilities."""
        with self.bench.machine.autocast(self.bench.precision):
            responses = generate(self.pair.student, self.prompts, self.sampling, (), self.uniforms)
            rows = self.pair.teacher.rows(join_prompts(self.prompts, responses, {}))
            rows.label_logprobs(responses.ids[responses.mask])

    def transformers(self) -> None:
        """The student alone by transformers' ``generate``, sampling at temperature 1."""
        from transformers import GenerationConfig

        settings = GenerationConfig(
            do_sample=True, top_k=0, top_p=1.0, max_new_tokens=self.sampling.max_new_tokens, pad_token_id=0
        )
        ids, mask = self.prompts.input_ids, self.prompts.attention_mask
        with torch.no_grad(), self.bench.machine.autocast(self.bench.precision):
            model: Any = self.pair.student.model
            model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)

    def work(self, way: str) -> str:
        """Run one way once, for its warm-up, and count its work."""
        with counted(self.pair.models) as counts:
            getattr(self, way)()
        return str(counts)


def mixed(bench: Bench) -> Iterator[Result]:
    """SmolLM2's shape on every device: a student of 30 and one of 10 layers beside a teacher of 30 layers."""
    rows, columns, new_tokens = (4, 8, 16) if bench.quick else (8, 32, 96)
    teacher = causal_lm(bench, tiny_config(2) if bench.quick else smol_config(30), 1)
    for layers in (30, 10):
        config = tiny_config(1 + layers // 30) if bench.quick else smol_config(layers)
        pair = Pair(causal_lm(bench, config, 0), FrozenTeacher(teacher))
        ways = Rollouts(bench, pair, random_prompts(bench, pair.vocabulary_size, rows, columns), new_tokens)
        work = warm_up(pair.models, {"ours": ways.mixed, "peer": ways.apart})
        seconds = alternate(
            {"ours": bench.clock(ways.mixed), "peer": bench.clock(ways.apart)}, bench.repeats, warm_up=False
        )
        share = f"{sum(ways.use_teacher)} of them the teacher's"
        size = f"{rows} x {new_tokens} tokens, {share}, student of {layers} layers"
        what = f"mixed rollouts, {size}, against the student's own and one forward pass of the teacher"
        yield compared(what, seconds["ours"], seconds["peer"], at_most(1.08), work)


def cuda_rollouts(bench: Bench) -> Iterator[Result]:
    """Qwen2.5's shapes in bfloat16: the student alone against transformers and its weights, and mixed against alone."""
    what = "rollouts of a 0.5B student and a 7B teacher"
    if not bench.machine.cuda:
        yield skipped(what, "needs CUDA")
        return
    if torch.cuda.get_device_properties(bench.machine.device).total_memory < NEEDED:
        yield skipped(what, f"the device has less than {NEEDED / GIB:.0f} GiB")
        return
    rows, columns, new_tokens = (4, 8, 16) if bench.quick else (64, 64, 256)
    pair = pair_of(bench)
    ways = Rollouts(bench, pair, random_prompts(bench, pair.vocabulary_size, rows, columns), new_tokens)
    notes = {way: ways.work(way) for way in ("student_alone", "without_graphs", "transformers", "mixed")}
    size = f"{rows} x {new_tokens} tokens"
    timed = {way: bench.clock(getattr(ways, way)) for way in notes}
    seconds = alternate(timed, bench.repeats, warm_up=False)
    alone = seconds["student_alone"]
    yield compared(
        f"student alone, {size}, against transformers' generate", alone, seconds["transformers"], at_least(6),
        f"ours: {notes['student_alone']}. peer: {notes['transformers']}",
    )  # fmt: skip
    yield compared(f"student alone, {size}, against itself without CUDA graphs", alone, seconds["without_graphs"])
    reading = new_tokens * _seconds_to_read(bench, pair)
    yield compared(
        f"student alone, {size}, against reading its weights once a token", alone, [reading] * len(alone), at_most(3)
    )
    yield compared(
        f"mixed, {size}, against the student alone", seconds["mixed"], alone, at_most(1.4), f"ours: {notes['mixed']}"
    )


def _seconds_to_read(bench: Bench, pair: Pair) -> float:
    """Seconds to read the student's weights once in bfloat16, at the speed of a copy."""
    source = torch.empty(GIB // 2, device=bench.machine.device)
    copy = bench.clock(partial(torch.empty_like(source).copy_, source))
    copy()
    speed = 2 * source.numel() * source.element_size() / min(copy() for _ in range(5))
    return 2 * sum(parameter.numel() for parameter in pair.student.parameters()) / speed
