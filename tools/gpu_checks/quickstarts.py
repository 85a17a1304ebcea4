"""Runs the quickstart of every method on the device and compares it with the CPU in float32.

The first optimiser step is compared on the same sequences, those of the CPU's run. Rounding can change a sampled token, and then
all tokens after it differ. So the rollouts of the device are compared separately: up to the first different token, together with
the number of equal responses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from gpu_checks.machine import EMULATED, Machine
from gpu_checks.project import CONFIGS
from gpu_checks.runs import Watch, changed, command, fit, method, relative
from gpu_checks.table import Row, below, holds, skipped

LOSS = {"32-true": 1e-4, "bf16-mixed": 2e-2}
"""Relative difference of the first loss."""
LOGPROBS = {"32-true": 1e-4, "bf16-mixed": 2e-2}
"""Mean difference of recorded log-probabilities in nats."""


def checks(machine: Machine) -> list[tuple[str, Callable[[], Iterable[Row]]]]:
    """One check per method: the quickstarts in ``configs/``, without KD and SFT on conversations."""
    names = sorted(path.stem for path in CONFIGS.glob("*quickstart.yaml") if not path.stem.startswith("chat"))
    return [(name, partial(quickstart, machine, name)) for name in names]


def quickstart(machine: Machine, name: str) -> Iterator[Row]:
    """Run one step on the CPU and ``machine.steps`` steps on the device in both precisions."""
    config = method(name, machine)
    if name == "seqkd_quickstart":
        config = changed(
            config, {"data.init_args.train.path": _teacher_responses(machine), "data.init_args.validation_size": 16}
        )
    steps, processor = machine.steps, {"trainer__accelerator": "cpu", "trainer__callbacks": []}
    reference = fit(machine, config, 1 if machine.cuda else steps, **processor)
    for precision, limit in LOSS.items():
        what = f"{precision}: first loss against the CPU's, relative"
        if machine.emulates(precision):
            yield skipped(what, EMULATED)
            continue
        if machine.cuda or precision != "32-true":
            watch = fit(machine, config, steps, Watch(reference.first), trainer__precision=precision)
            yield below(what, relative(watch.losses[0], reference.losses[0]), limit)
            if reference.rollouts is not None:
                yield _rollouts(precision, watch.rollouts, reference.rollouts)
        else:
            watch = reference
            yield skipped(what, "it is the CPU run itself")
        finite = sum(map(math.isfinite, watch.losses))
        yield holds(f"{precision}: losses are finite", finite == steps, f"{finite} of {steps}")


def _teacher_responses(machine: Machine) -> str:
    """Generate the teacher's responses for SeqKD with `predict`, as in the head of its config; returns the path."""
    path = machine.folder / "seqkd.jsonl"
    keys = {
        "model.prediction": {"model": "teacher", "path": str(path), "max_new_tokens": 32},
        "trainer.accelerator": machine.device.type,
        "trainer.devices": 1,
        "trainer.enable_progress_bar": False,
        "trainer.default_root_dir": str(machine.folder / "runs"),
        "data.init_args.num_train": 160,
    }
    command(machine, "predict", changed(method("quickstart", machine), keys))
    return str(path)


def _rollouts(precision: str, own: Any, reference: Any) -> Row:
    """Compare the log-probabilities before the first different token, and count the equal responses."""
    width = min(own.responses.ids.shape[1], reference.responses.ids.shape[1])
    ours, theirs = own.responses, reference.responses
    same = (ours.ids[:, :width] == theirs.ids[:, :width]) & (ours.mask[:, :width] == theirs.mask[:, :width])
    before = same.long().cumprod(dim=-1).bool() & theirs.mask[:, :width]
    whole = (same.all(dim=-1) & (ours.mask.sum(dim=-1) == theirs.mask.sum(dim=-1))).sum()
    scores = [(ours.logprobs, theirs.logprobs)]
    if theirs.teacher_logprobs is not None:
        scores.append((ours.teacher_logprobs, theirs.teacher_logprobs))
    gaps = [(a[:, :width] - b[:, :width]).abs()[before] for a, b in scores]
    note = f"{int(whole)} of {len(same)} responses equal, largest {max(float(gap.max()) for gap in gaps):.2g} nats"
    what = f"{precision}: log-probabilities of rollouts against the CPU's, nats"
    return below(what, max(float(gap.mean()) for gap in gaps), LOGPROBS[precision], note)
