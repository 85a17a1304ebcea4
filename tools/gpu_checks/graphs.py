"""Decoding by CUDA graphs: its records, speed and memory. Last of the subjects, since a failed capture may end the process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from gpu_checks.machine import Machine
from gpu_checks.rollouts import LIMITS, mixed, pair_on
from gpu_checks.speed import a_pair, decoding
from gpu_checks.table import Row, below, holds, skipped
from lit_distill.generation import SamplingParams, generate_mixed, row_uniforms
from lit_distill.models.fixed_passes import check_fixed_passes
from lit_distill.types import Prompts

MIB = 2**20


def checks(machine: Machine) -> list[tuple[str, Callable[[], Iterable[Row]]]]:
    """The check at load, records per precision, memory, and speed."""
    if not machine.cuda:
        return [("graphs", lambda: [skipped("decoding by CUDA graphs", "needs CUDA")])]
    records = [("graphs", partial(mixed, machine, precision, True)) for precision in LIMITS]
    return [
        ("graphs", partial(accepted, machine)), *records,
        ("graphs", partial(memory, machine)), ("graphs", partial(speed, machine)),
    ]  # fmt: skip


def accepted(machine: Machine) -> Iterator[Row]:
    """Let the check of a model that loads try the embedded student in both precisions."""
    for precision in LIMITS:
        student, _, _ = pair_on(machine, precision)
        with machine.autocast(precision):
            check_fixed_passes(student, "student", machine.device)
        yield holds(f"{precision}: its passes can be captured, and replays equal them", True)


def memory(machine: Machine) -> Iterator[Row]:
    """Generate often, and compare what is reserved after three generations and after twenty."""
    student, teacher, _ = pair_on(machine, "bf16-mixed")
    student.cuda_graphs = teacher.lm.cuda_graphs = True
    ids = torch.randint(2, student.vocabulary_size, (64, 32), device=machine.device)
    uniforms = row_uniforms(0, [str(row) for row in range(64)], 64)
    use_teacher = [step % 5 == 0 for step in range(64)]
    reserved = []
    for _ in range(20):
        with machine.autocast("bf16-mixed"):
            generate_mixed(
                student, teacher, use_teacher, Prompts(ids, torch.ones_like(ids)), SamplingParams(64), (), uniforms
            )
        reserved.append(torch.cuda.memory_reserved(machine.device) / MIB)
    yield below("growth of the reserved memory from 3 to 20 generations, MiB", reserved[-1] - reserved[2], 64)


def speed(machine: Machine) -> Iterator[Row]:
    """Measure decoding with graphs, of the pair that `speed` measures without."""
    pair, _ = a_pair(machine)
    yield from decoding(machine, pair, graphs=True)
