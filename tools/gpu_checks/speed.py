"""Speed of the device, of a KD step and of the decode loop, and how often they synchronise with the device.

The models have the shapes of real models and random weights.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Qwen2Config

from gpu_checks.machine import Machine
from gpu_checks.rollouts import pair_on
from gpu_checks.runs import ASSETS, bare_trainer
from gpu_checks.table import Row, below, measured, skipped
from lit_distill.generation import SamplingParams, generate, generate_mixed, row_uniforms
from lit_distill.models import CausalLM, ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import ForwardKL, NextToken
from lit_distill.teachers import FrozenTeacher
from lit_distill.types import Batch, Prompts, Sequences

GIB = 2**30
SYNCHRONISES = "called a synchronizing CUDA operation"
WAITS_PER_STEP, WAITS_PER_TOKEN, WAITS_WITH_GRAPHS = 24, 2.0, 0.25
"""Limits: synchronisations must not grow with layers or rows. Transformers causes one per forward pass, to look for padding; a
captured step has none."""
QWEN_HALF = Qwen2Config(
    vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
QWEN_SEVEN = Qwen2Config(
    vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip
NEEDED = 48 * GIB
"""Bytes needed on the device: 16 per weight of 0.5 billion, 2 per weight of 7.6 billion, activations of 4,096 tokens, logits."""


class Pair(NamedTuple):
    """Two models and the problem sizes for the measurement."""

    name: str
    student: CausalLM
    teacher: FrozenTeacher
    texts: int
    length: int
    prompts: int
    new_tokens: int


def checks(machine: Machine) -> list[tuple[str, Callable[[], Iterable[Row]]]]:
    """The check of the device alone, and that of a model pair."""
    peak: list[float] = []
    return [("device", partial(device, machine, peak)), ("speed", partial(speed, machine, peak))]


def device(machine: Machine, peak: list[float]) -> Iterator[Row]:
    """Measure a matrix product and a copy as upper bounds; the FLOP/s of the product are appended to ``peak``."""
    size, dtype = (8192, torch.bfloat16) if machine.cuda else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=machine.device, dtype=dtype) for _ in range(2))
    peak.append(2 * size**3 / _seconds(machine, lambda: a @ b, 30 if machine.cuda else 3))
    kind = "bfloat16" if machine.cuda else "float32"
    yield measured(f"product of {size} x {size}, {kind}, TFLOP/s", peak[0] / 1e12)
    a = torch.empty((GIB if machine.cuda else GIB // 16) // 2, device=machine.device)
    b = torch.empty_like(a)
    seconds = _seconds(machine, lambda: b.copy_(a), 10)
    yield measured("copy, read and written, GB/s", 2 * a.numel() * a.element_size() / seconds / 1e9)


def speed(machine: Machine, peak: list[float]) -> Iterator[Row]:
    """Measure KD steps and decoding of one pair."""
    pair, note = a_pair(machine)
    if note is not None:
        yield note
    yield from _kd(machine, pair, peak)
    machine.clear()
    yield from decoding(machine, pair)


def a_pair(machine: Machine) -> tuple[Pair, Row | None]:
    """Models of the sizes that the device holds, and a row that says so if it is too small for those of Qwen2.5."""
    if machine.cuda and torch.cuda.get_device_properties(machine.device).total_memory < NEEDED:
        small = pair_on(machine, "bf16-mixed")
        note = skipped("0.5B student and 7B teacher", f"the device has less than {NEEDED / GIB:.0f} GiB")
        return Pair("embedded pair", small[0], small[1], 8, 128, 16, 64), note
    if machine.cuda:
        return Pair("7B to 0.5B", *_random_pair(machine), 8, 512, 16, 64), None
    small = pair_on(machine, "32-true")
    return Pair("embedded pair", small[0], small[1], 8, 64, 4, 16), None


def _random_pair(machine: Machine) -> tuple[CausalLM, FrozenTeacher]:
    with machine.device:
        student = AutoModelForCausalLM.from_config(QWEN_HALF, dtype=torch.float32)
        teacher = AutoModelForCausalLM.from_config(QWEN_SEVEN, dtype=torch.bfloat16)
    vocabulary = QWEN_HALF.vocab_size
    return CausalLM(student.eval(), vocabulary), FrozenTeacher(CausalLM(teacher.eval(), vocabulary))


class _Watch(L.Callback):
    """Times some steps after the warm-up, then counts the synchronisations with the device in a few more."""

    def __init__(self, machine: Machine, warm: int, timed: int, counted: int) -> None:
        self.machine, self.warm, self.timed, self.counted = machine, warm, timed, counted
        self.seconds = 0.0
        self.waits: Counter[str] = Counter()
        self._context: Any = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock; later stop it and start counting. The copy of the next batch is part of a step."""
        if batch_idx == self.warm:
            self.machine.wait()
            if self.machine.cuda:
                torch.cuda.reset_peak_memory_stats(self.machine.device)
            self.seconds = -time.perf_counter()
        if batch_idx == self.warm + self.timed:
            self.machine.wait()
            self.seconds += time.perf_counter()
            self._context = counted_waits(self.machine, self.waits)
            self._context.__enter__()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Stop counting."""
        if self._context is not None:
            self._context.__exit__(None, None, None)


def _kd(machine: Machine, pair: Pair, peak: list[float]) -> Iterator[Row]:
    """Measure KD steps of a Trainer, as in a run, without validation, logs and checkpoints."""
    warm, timed, counted = (3, 8, 4) if machine.cuda else (1, 2, 1)
    generator = torch.Generator().manual_seed(0)
    vocabulary = pair.student.vocabulary_size
    ids = torch.randint(vocabulary, (pair.texts, pair.length), generator=generator)
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, 0] = False
    names = tuple(map(str, range(pair.texts)))
    batches = [Batch(names, sequences=Sequences(ids, torch.ones_like(ids), targets))] * (warm + timed + counted)
    objectives = {"kd": ForwardKL(0.5), "ce": NextToken(0.5)}
    spec = ModelSpec(str(ASSETS / "student"))
    optimizer = partial(torch.optim.AdamW, lr=1e-5)
    watch = _Watch(machine, warm, timed, counted)
    with patch("lit_distill.module.load_models", lambda *_: (pair.student, {"teacher": pair.teacher})):
        module = DistillationModule(spec, objectives, spec, optimizer=optimizer)
        trainer = bare_trainer(machine, "bf16-mixed" if machine.cuda else "32-true", len(batches), watch)
        loader = DataLoader(batches, batch_size=None, pin_memory=machine.cuda)  # type: ignore[arg-type]
        trainer.fit(module, loader)
    pair.student.zero_grad()
    pair.student.to(machine.device)  # Lightning has moved it to host memory
    tokens = pair.texts * pair.length
    seconds = watch.seconds / timed
    sizes = [sum(p.numel() for p in lm.parameters()) for lm in (pair.student, pair.teacher.lm)]
    flops = tokens * (6 * sizes[0] + 2 * sizes[1])
    share = f"; {flops / seconds / 1e12:.3g} TFLOP/s, {flops / seconds / peak[0]:.0%} of the product's" if peak else ""
    what = f"{pair.name}, KD step of {pair.texts} x {pair.length} tokens"
    yield measured(f"{what}, s", seconds, f"{tokens / seconds:.0f} tokens/s{share}")
    if not machine.cuda:
        yield skipped(f"{what}: memory and waits", "not measurable on a CPU")
        return
    yield measured(f"{what}: peak memory, GiB", torch.cuda.max_memory_allocated(machine.device) / GIB)
    waits = sum(watch.waits.values()) / counted
    yield below(f"{what}: waits for the device a step", waits, WAITS_PER_STEP, most_frequent(watch.waits, counted))


def decoding(machine: Machine, pair: Pair, graphs: bool = False) -> Iterator[Row]:
    """Measure decoding of the student alone, and of teacher-mixed rollouts, without or with CUDA graphs."""
    pair.student.cuda_graphs = pair.teacher.lm.cuda_graphs = graphs
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, pair.student.vocabulary_size, (pair.prompts, 32), generator=generator).to(machine.device)
    prompts = Prompts(ids, torch.ones_like(ids))
    settings = SamplingParams(pair.new_tokens)
    uniforms = row_uniforms(0, [str(row) for row in range(pair.prompts)], pair.new_tokens)
    use_teacher = (torch.rand(pair.new_tokens, generator=generator) < 0.2).tolist()
    ways: dict[str, Callable[[], Any]] = {
        "student": lambda: generate(pair.student, prompts, settings, (), uniforms),
        "mixed 0.2": lambda: generate_mixed(pair.student, pair.teacher, use_teacher, prompts, settings, (), uniforms),
    }
    for name, decode in ways.items():
        what = f"{pair.name}, {name}{', CUDA graphs' * graphs}: {pair.prompts} prompts, {pair.new_tokens} tokens"
        with machine.autocast("bf16-mixed" if machine.cuda else "32-true"):
            seconds = _seconds(machine, decode, 2, warm=1)
            waits: Counter[str] = Counter()
            with counted_waits(machine, waits):
                decode()
        rate = pair.prompts * pair.new_tokens / seconds
        yield measured(f"{what}, ms a token step", 1000 * seconds / pair.new_tokens, f"{rate:.0f} tokens/s")
        if not machine.cuda:
            yield skipped(f"{what}: waits for the device", "not measurable on a CPU")
            continue
        each = sum(waits.values()) / pair.new_tokens
        yield below(
            f"{what}: waits for the device a step",
            each,
            WAITS_WITH_GRAPHS if graphs else WAITS_PER_TOKEN,
            most_frequent(waits, pair.new_tokens),
        )


@contextmanager
def counted_waits(machine: Machine, places: Counter[str]) -> Iterator[None]:
    """Count the synchronisations of host and device, by the line of Python code that caused them."""
    if not machine.cuda:
        yield
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [entry for entry in seen if SYNCHRONISES in str(entry.message)]
    places.update("/".join(Path(entry.filename).parts[-2:]) + f":{entry.lineno}" for entry in found)


def most_frequent(waits: Counter[str], times: int) -> str:
    """The lines of code with the most waits, each with its waits in one of ``times``."""
    return ", ".join(f"{place} {count / times:.2g}" for place, count in waits.most_common(12))


def _seconds(machine: Machine, work: Callable[[], Any], times: int, warm: int = 2) -> float:
    """Mean time of one call, after ``warm`` calls that are not timed."""
    for _ in range(warm):
        work()
    machine.wait()
    since = time.perf_counter()
    for _ in range(times):
        work()
    machine.wait()
    return (time.perf_counter() - since) / times
