"""Checks that sharding, resuming, adapters and gradient checkpointing do not change the result of a run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial

from gpu_checks.machine import EMULATED, Machine
from gpu_checks.runs import StoppedError, Watch, distance, fit, furthest, method
from gpu_checks.table import Row, below, skipped

STEPS = 4


def checks(machine: Machine) -> list[tuple[str, Callable[[], Iterable[Row]]]]:
    """All training checks."""
    every = {
        "fsdp2": fsdp2,
        "resume": partial(resume, config="quickstart"),
        "resume, rollouts": partial(resume, config="minillm_quickstart"),
        "lora": lora,
        "gradient checkpointing": gradient_checkpointing,
    }
    return [(name, partial(check, machine)) for name, check in every.items()]


def fsdp2(machine: Machine) -> Iterator[Row]:
    """FSDP2 on one rank gives the same result as a run without it."""
    config = method("quickstart", machine)
    for precision, limit, weights in (("32-true", 1e-5, 1e-4), ("bf16-mixed", 2e-2, None)):
        if machine.emulates(precision):
            yield skipped(precision, EMULATED)
            continue
        whole = fit(machine, config, STEPS, trainer__precision=precision)
        shards = fit(machine, config, STEPS, trainer__precision=precision, trainer__strategy="fsdp2")
        backend = "nccl" if machine.cuda else "gloo"
        yield below(
            f"{precision}: losses with fsdp2 on one rank ({backend}) and without, relative",
            furthest(shards.losses, whole.losses),
            limit,
        )
        if weights:
            yield below(
                f"{precision}: weights after {STEPS} steps, relative", distance(shards.weights, whole.weights), weights
            )


def resume(machine: Machine, config: str) -> Iterator[Row]:
    """A run that was killed and resumed from its checkpoint has the same weights as an uninterrupted one."""
    settings = method(config, machine)
    steps = STEPS
    settings["checkpoint"] = {"monitor": None, "every_n_train_steps": steps // 2}
    if config != "quickstart":  # two phases of equal size
        inner = settings["model"]["source"]["init_args"]
        inner |= {"mini_batch_size": 8, "inner_epochs": 1, "max_new_tokens": 16}
        settings["data"]["init_args"]["batch_size"] = 16
    straight = fit(machine, settings, steps)
    again = fit(machine, settings, steps, name=f"again {config}") if machine.cuda else straight
    name = f"resumed {config}"
    with suppress(StoppedError):
        fit(machine, settings, steps, Watch(killed_after=steps // 2), name=name)
    resumed = fit(machine, settings, steps, name=name, ckpt_path="last")
    if len(resumed.terms) != steps - steps // 2:
        raise RuntimeError(f"the resumed run took {len(resumed.terms)} steps: it did not resume from step {steps // 2}")
    noise = distance(again.weights, straight.weights)
    note = f"two uninterrupted runs: {noise:.2g}" if machine.cuda else ""
    what = f"weights after {steps // 2} + {steps // 2} steps against {steps}, relative"
    yield below(what, distance(resumed.weights, straight.weights), 0.0 if noise == 0 else max(1e-5, 4 * noise), note)


def lora(machine: Machine) -> Iterator[Row]:
    """A student with adapters has the same losses on the device as on the CPU."""
    if importlib.util.find_spec("peft") is None:
        yield skipped("a student with adapters", "peft is not installed")
        return
    config = method("quickstart", machine)
    config["model"]["student"]["lora"] = {"r": 4}
    reference = fit(machine, config, STEPS, trainer__accelerator="cpu")
    if machine.cuda:
        own = fit(machine, config, STEPS)
        yield below("32-true: losses against the CPU's, relative", furthest(own.losses, reference.losses), 1e-4)
    if machine.emulates("bf16-mixed"):
        yield skipped("bf16-mixed", EMULATED)
        return
    mixed = fit(machine, config, STEPS, trainer__precision="bf16-mixed")
    yield below("bf16-mixed: losses against the CPU's, relative", furthest(mixed.losses, reference.losses), 2e-2)


def gradient_checkpointing(machine: Machine) -> Iterator[Row]:
    """Gradient checkpointing does not change the losses."""
    config = method("quickstart", machine)
    for precision, limit in (("32-true", 1e-5), ("bf16-mixed", 1e-2)):
        if machine.emulates(precision):
            yield skipped(precision, EMULATED)
            continue
        plain = fit(machine, config, STEPS, trainer__precision=precision)
        config["model"]["student"]["gradient_checkpointing"] = True
        again = fit(machine, config, STEPS, trainer__precision=precision)
        config["model"]["student"]["gradient_checkpointing"] = False
        yield below(f"{precision}: losses with and without it, relative", furthest(again.losses, plain.losses), limit)
