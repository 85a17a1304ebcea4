"""Optimiser steps of the project in a Lightning Trainer, as in a run, without validation, logs and checkpoints."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import lightning as L
import torch
from gpu_checks.runs import ASSETS, bare_trainer
from gpu_checks.speed import counted_waits
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.measure import PeakMemory
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule

if TYPE_CHECKING:
    from gpu_checks.machine import Machine

    from benchmarks.measure import Bench
    from benchmarks.models import Pair
    from lit_distill.objectives import Objective
    from lit_distill.types import Batch

RATE = 1e-6
"""Learning rate. It is small, so that the models hardly change between rounds."""


class Step(NamedTuple):
    """What was measured in one step, or in one phase of steps."""

    seconds: float
    loss: float
    """Of the last optimiser step."""
    peak: float | None
    """Bytes beyond weights and optimiser, with the gradients; None if not measured."""


class StepMeter:
    """Times every step and, if asked, measures the memory of the second one.

    Args:
        machine: device.
        memory: measure it. The gradients of the step before are freed then, so that no way has them in its baseline.
    """

    def __init__(self, machine: Machine, memory: bool) -> None:
        self.machine = machine
        self.memory = memory
        self.seconds: list[float] = []
        self.peak: float | None = None
        self._since = 0.0
        self._peak: PeakMemory | None = None

    def begin(self, student: nn.Module) -> None:
        """A step begins."""
        if self.memory and len(self.seconds) == 1:
            student.zero_grad(set_to_none=True)
            self._peak = PeakMemory(self.machine)
            self._peak.__enter__()
        self.machine.wait()
        self._since = time.perf_counter()

    def end(self) -> None:
        """It has ended."""
        self.machine.wait()
        self.seconds.append(time.perf_counter() - self._since)
        if self._peak is not None:
            self._peak.__exit__(None, None, None)
            self.peak, self._peak = self._peak.extra, None


class Watch(L.Callback):
    """Meters the batches of a Trainer, or counts how often they wait for the device.

    Args:
        machine: device.
        memory: see `StepMeter`.
        waits: count the waits of the batches after the first two into it.
    """

    def __init__(self, machine: Machine, memory: bool = False, waits: Counter[str] | None = None) -> None:
        self.meter = StepMeter(machine, memory)
        self.waits = waits
        self.loss = torch.zeros(())
        self._counting: Any = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock, or the counter."""
        if self.waits is None:
            self.meter.begin(module.student)
        elif batch_idx == 2:
            self._counting = counted_waits(self.meter.machine, self.waits)
            self._counting.__enter__()

    def on_loss_terms(self, trainer: Any, module: Any, terms: Any) -> None:
        """Keep the loss, on its device."""
        self.loss = terms["loss"]

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop the clock."""
        if self.waits is None:
            self.meter.end()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Stop the counter."""
        if self._counting is not None:
            self._counting.__exit__(None, None, None)


def train(
    bench: Bench,
    pair: Pair,
    objectives: Mapping[str, Objective],
    batches: Sequence[Batch],
    watch: Watch,
    steps: int | None = None,
    **settings: Any,
) -> Step:
    """Train on ``batches``, in a Trainer of its own; the last batch is what is returned.

    No response ends early: the stop token is none of the vocabulary.

    Args:
        bench: device and precision.
        pair: both models; the student is trained.
        objectives: by name.
        batches: one a step, or one a phase.
        watch: meters the batches.
        steps: optimiser steps, if not one a batch.
        settings: further arguments of `DistillationModule`.
    """
    spec = ModelSpec(str(ASSETS / "student"))
    optimizer = partial(torch.optim.AdamW, lr=RATE)
    models, stops = (pair.student, {"teacher": pair.teacher}), (pair.vocabulary_size,)
    with (
        patch("lit_distill.module.load_models", lambda *_: models),
        patch("lit_distill.module.stop_token_ids", lambda *_: stops),
    ):
        module = DistillationModule(spec, dict(objectives), spec, optimizer=optimizer, **settings)
        trainer = bare_trainer(bench.machine, bench.precision, steps or len(batches), watch)
        trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    pair.student.zero_grad()
    pair.student.eval().to(bench.machine.device)  # Lightning has moved it to host memory
    return Step(watch.meter.seconds[-1] if watch.meter.seconds else 0.0, float(watch.loss), watch.meter.peak)
