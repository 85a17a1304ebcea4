"""P7: how often the host waits for the device, in training steps and in decoding; on CUDA only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from gpu_checks.speed import counted_waits, most_frequent

from benchmarks.measure import Bench
from benchmarks.models import Pair, pair_of, random_prompts, random_texts
from benchmarks.results import Result, at_most, limited, skipped
from benchmarks.rollouts import Rollouts
from benchmarks.training import Watch, train
from lit_distill.objectives import ForwardKL, NextToken
from lit_distill.types import Batch

COUNTED = 4
"""Batches whose waits are counted."""


def waits(bench: Bench) -> Iterator[Result]:
    """Two waits an optimiser step and one a micro-batch; one for 16 decoded tokens."""
    if not bench.machine.cuda:
        yield skipped("waits of the host for the device", "needs CUDA")
        return
    pair = pair_of(bench)
    for micro_batches in (1, 4):
        yield _of_steps(bench, pair, micro_batches)
    rows, columns, new_tokens = bench.size((4, 8, 32), (4, 8, 32), (16, 32, 256))
    ways = Rollouts(bench, pair, random_prompts(bench, pair.vocabulary_size, rows, columns), new_tokens)
    for name, way in {"student alone": ways.student_alone, "mixed": ways.mixed}.items():
        way()
        places: Counter[str] = Counter()
        with counted_waits(bench.machine, places):
            way()
        sixteens = new_tokens / 16
        what = f"waits for each 16 tokens of decoding, {name}"
        yield limited(what, sum(places.values()) / sixteens, "", at_most(1), most_frequent(places, round(sixteens)))


def _of_steps(bench: Bench, pair: Pair, micro_batches: int) -> Result:
    texts, length = bench.size((4, 16), (4, 16), (8, 256))
    sequences = random_texts(bench, pair.vocabulary_size, torch.full((texts,), length)).to("cpu").pin_memory()
    batches = [Batch(tuple(map(str, range(texts))), sequences=sequences)] * (2 + COUNTED)
    places: Counter[str] = Counter()
    watch = Watch(bench.machine, waits=places)
    objectives = {"kd": ForwardKL(0.5), "ce": NextToken(0.5)}
    train(bench, pair, objectives, batches, watch, micro_batch_size=texts // micro_batches)
    what = f"waits a KD step of {micro_batches} micro-batches"
    return limited(what, sum(places.values()) / COUNTED, "", at_most(2 + micro_batches), most_frequent(places, COUNTED))
