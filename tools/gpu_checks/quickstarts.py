"""The quickstart of every method on the device, against the processor in float32.

The first optimiser step is compared on the same texts: those of the processor's run. A draw whose number lies within rounding of
the border between two tokens may give the one on the processor and the other on the device, and all of the text after it is then
another one; so what the device rolls out itself is compared apart, up to the first such token, with the number of equal texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from gpu_checks.machine import Machine
from gpu_checks.project import CONFIGS
from gpu_checks.runs import Watch, changed, command, fit, method, relative
from gpu_checks.table import Row, below, holds, skipped

LOSS = {"32-true": 1e-4, "bf16-mixed": 2e-2}
"""Relative difference of the first loss."""
LOGPROBS = {"32-true": 1e-4, "bf16-mixed": 2e-2}
"""Mean difference of recorded log-probabilities in nats."""


def checks(machine: Machine) -> list[tuple[str, Callable[[], Iterable[Row]]]]:
    """One for every quickstart in ``configs/``."""
    names = sorted(path.stem for path in CONFIGS.glob("*quickstart.yaml"))
    return [(name, partial(quickstart, machine, name)) for name in names]


def quickstart(machine: Machine, name: str) -> Iterator[Row]:
    """A run on the processor until its first step, and runs on the device in both precisions."""
    config = method(name, machine)
    if name == "seqkd_quickstart":
        config = changed(config, {"data.init_args.train.path": _answers(machine), "data.init_args.validation_size": 16})
    steps, processor = machine.steps, {"trainer__accelerator": "cpu", "trainer__callbacks": []}
    reference = fit(machine, config, 1 if machine.cuda else steps, **processor)
    for precision, limit in LOSS.items():
        what = f"{precision}: first loss against the processor's, relative"
        if machine.cuda or precision != "32-true":
            watch = fit(machine, config, steps, Watch(reference.first), trainer__precision=precision)
            yield below(what, relative(watch.losses[0], reference.losses[0]), limit)
            if reference.rollouts is not None:
                yield _rollouts(precision, watch.rollouts, reference.rollouts)
        else:
            watch = reference
            yield skipped(what, "it is the processor's")
        finite = sum(map(math.isfinite, watch.losses))
        yield holds(f"{precision}: losses are finite", finite == steps, f"{finite} of {steps}")


def _answers(machine: Machine) -> str:
    """What SeqKD learns from: the teacher's answers, as the head of its config says."""
    path = machine.folder / "seqkd.jsonl"
    keys = {
        "model.prediction": {"speaker": "teacher", "path": str(path), "max_new_tokens": 32},
        "trainer.accelerator": machine.device.type,
        "trainer.devices": 1,
        "trainer.enable_progress_bar": False,
        "trainer.default_root_dir": str(machine.folder / "runs"),
        "data.init_args.num_train": 160,
    }
    command(machine, "predict", changed(method("quickstart", machine), keys))
    return str(path)


def _rollouts(precision: str, own: Any, reference: Any) -> Row:
    """Log-probabilities of the tokens before the first one that differs, and how many texts are equal."""
    width = min(own.responses.ids.shape[1], reference.responses.ids.shape[1])
    ours, theirs = own.responses, reference.responses
    same = (ours.ids[:, :width] == theirs.ids[:, :width]) & (ours.mask[:, :width] == theirs.mask[:, :width])
    before = same.long().cumprod(dim=-1).bool() & theirs.mask[:, :width]
    whole = (same.all(dim=-1) & (ours.mask.sum(dim=-1) == theirs.mask.sum(dim=-1))).sum()
    scores = [(ours.logprobs, theirs.logprobs)]
    if theirs.teacher_logprobs is not None:
        scores.append((ours.teacher_logprobs, theirs.teacher_logprobs))
    gaps = [(a[:, :width] - b[:, :width]).abs()[before] for a, b in scores]
    note = f"{int(whole)} of {len(same)} texts equal, largest {max(float(gap.max()) for gap in gaps):.2g} nats"
    what = f"{precision}: log-probabilities of rollouts against the processor's, nats"
    return below(what, max(float(gap.mean()) for gap in gaps), LOGPROBS[precision], note)
