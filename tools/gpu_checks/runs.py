"""Runs of the command line in this process, on the embedded pair: their losses, first texts and weights."""

from __future__ import annotations

import copy
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from lightning.pytorch import Callback
from torch import Tensor

import lit_distill
from gpu_checks.machine import Machine
from gpu_checks.project import CONFIGS
from lit_distill.cli import DistillCLI

ASSETS = Path(lit_distill.__file__).parent / "assets"
RANK_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


class StoppedError(Exception):
    """A run was to end here."""


class Watch(Callback):
    """Keeps what a run does.

    Args:
        replay: learn in the first optimiser step from these texts instead of the source's own.
        killed_after: raise `StoppedError` after so many optimiser steps.
    """

    def __init__(self, replay: Any = None, killed_after: int | None = None) -> None:
        self.replay = replay
        self.killed_after = killed_after
        self.first: Any = None
        """The texts of the first optimiser step, in host memory."""
        self.rollouts: Any = None
        """What was rolled out before the first optimiser step, in host memory."""
        self.terms: list[Tensor] = []
        self.weights: dict[str, Tensor] = {}

    @property
    def losses(self) -> list[float]:
        """Of each optimiser step."""
        return [float(term) for term in self.terms]

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Look at what the source yields."""
        own = module.source.mini_batches

        def watched(batch: Any, players: Any) -> Iterator[Any]:
            for text in own(batch, players):
                if self.first is not None:
                    yield text
                    continue
                self.first = text.to("cpu")
                yield text if self.replay is None else self.replay.to(module.device)

        module.source.mini_batches = watched

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """End the run, if its time has come."""
        if module.global_step == self.killed_after:
            raise StoppedError

    def on_rollouts(self, trainer: Any, module: Any, trajectories: Any) -> None:
        """Keep the first, if nothing was learnt before."""
        if self.rollouts is None and module.global_step == 0:
            self.rollouts = trajectories.to("cpu")

    def on_loss_terms(self, trainer: Any, module: Any, terms: Any) -> None:
        """Keep the loss."""
        self.terms.append(terms["loss"])

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Keep the weights while shards can be gathered."""
        for name, parameter in module.student.named_parameters():
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            self.weights[name] = whole.detach().float().cpu()


def method(name: str, machine: Machine) -> dict[str, Any]:
    """A quickstart config, cut to a size that a check can afford.

    Args:
        name: of the file in ``configs/``, without its suffix.
        machine: a processor gets less.
    """
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    for role in ("student", "teacher"):
        config["model"][role]["path"] = str(ASSETS / role)
    data, settings = config["data"]["init_args"], config["model"].get("source", {}).get("init_args", {})
    if "num_train" in data:
        data |= {"num_train": 32 * machine.steps, "num_validation": 16, "num_test": 16}
    if not machine.cuda:
        data["batch_size"] = 16
        settings |= {name: 16 for name in ("max_new_tokens",) if name in settings}
        settings |= {name: 8 for name in ("mini_batch_size",) if name in settings}
        config["trainer"]["callbacks"] = []
        config["generation"] = {"max_prompts": 0}
        config["trainer"]["val_check_interval"] = 10**6
    else:
        config["trainer"]["val_check_interval"] = 2 if "mini_batch_size" in settings else 10
        config["generation"] = {"max_prompts": 8, "max_new_tokens": 32}
    if "corpus" in data:
        data["corpus"] = {"num_documents": 500}
    return config


def changed(config: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """A copy with other values.

    Args:
        config: nested.
        keys: by dotted name, such as ``trainer.precision``.
    """
    config = copy.deepcopy(config)
    for key, value in keys.items():
        *path, last = key.split(".")
        inner = config
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return config


def fit(
    machine: Machine,
    config: dict[str, Any],
    steps: int,
    watch: Watch | None = None,
    name: str | None = None,
    **keys: Any,
) -> Watch:
    """What a run of ``steps`` optimiser steps did; one that did the same before does not run again.

    Args:
        machine: the device to run on, unless ``keys`` say otherwise.
        config: of the run.
        steps: until it ends.
        watch: what keeps it; with one, or a name, it always runs.
        name: of the run's folder.
        keys: other values of the config, by dotted name with ``__`` for the dot.
    """
    chosen = {
        "trainer.accelerator": machine.device.type,
        "trainer.devices": 1,
        "trainer.max_steps": steps,
        "trainer.default_root_dir": str(machine.folder / "runs"),
        "trainer.enable_progress_bar": False,
        "run_name": name or "run",
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    whole = changed(config, chosen)
    key = yaml.safe_dump(whole)
    if watch is None and name is None and key in machine.runs:
        return machine.runs[key]
    own = watch or Watch()
    command(machine, "fit", whole, own)
    if watch is None and name is None:
        machine.runs[key] = own
    return own


def command(machine: Machine, word: str, config: dict[str, Any], watch: Watch | None = None) -> Any:
    """Run a command of the command line; what it prints is dropped."""
    path = machine.folder / f"{word}.yaml"
    path.write_text(yaml.safe_dump(config))
    defaults = {"callbacks": [watch]} if watch else {}
    said = io.StringIO()
    with patch.object(sys, "argv", ["lit-distill"]), _environment(), redirect_stdout(said), redirect_stderr(said):
        try:
            return DistillCLI([word, "--config", str(path)], trainer_defaults=defaults)
        except SystemExit as exit_:
            raise RuntimeError(said.getvalue().strip() or "the command line refused its config") from exit_


@contextmanager
def _environment() -> Iterator[None]:
    """Leave no process group and none of its variables behind, so that a next run begins as the first."""
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    try:
        yield
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def relative(value: float, reference: float) -> float:
    """How far a number is from another one, as a share of that."""
    return abs(value - reference) / max(abs(reference), 1e-12)


def furthest(losses: list[float], others: list[float]) -> float:
    """The largest relative difference of two runs' losses; infinite if they are not equally many."""
    if len(losses) != len(others) or not losses:
        return float("inf")
    return max(map(relative, losses, others))


def distance(weights: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest difference of two students' weights, as a share of the largest weight."""
    if weights.keys() != others.keys():
        raise ValueError(f"the students have other weights: {sorted(weights.keys() ^ others.keys())[:4]}")
    largest = max(float(weight.abs().max()) for weight in weights.values())
    return max(float((weights[name] - others[name]).abs().max()) for name in weights) / largest
