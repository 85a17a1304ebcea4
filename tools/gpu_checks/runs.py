"""Runs the command line in this process on the embedded pair, and records losses, first sequences and weights."""

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
from lightning.pytorch import Callback, Trainer
from torch import Tensor

import lit_distill
from gpu_checks.machine import Machine
from gpu_checks.project import CONFIGS
from lit_distill.cli.app import DistillCLI

ASSETS = Path(lit_distill.__file__).parent / "assets"
RANK_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


def bare_trainer(machine: Machine, precision: Any, steps: int, callback: Callback) -> Trainer:
    """A Trainer on the device without validation, logs, checkpoints and bars, to measure its steps."""
    return Trainer(
        accelerator=machine.device.type, devices=1, precision=precision, max_steps=steps, limit_val_batches=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback], default_root_dir=machine.folder, log_every_n_steps=10**6,
    )  # fmt: skip


class StoppedError(Exception):
    """Raised by `Watch` to end a run on purpose."""


class Watch(Callback):
    """Records losses, first sequences, rollouts and weights of a run.

    Args:
        replay: sequences for the first optimiser step, instead of those of the source.
        killed_after: raise `StoppedError` after this many optimiser steps.
    """

    def __init__(self, replay: Any = None, killed_after: int | None = None) -> None:
        self.replay = replay
        self.killed_after = killed_after
        self.first: Any = None
        """The sequences of the first optimiser step, in host memory."""
        self.rollouts: Any = None
        """The rollouts before the first optimiser step, in host memory."""
        self.terms: list[Tensor] = []
        self.weights: dict[str, Tensor] = {}

    @property
    def losses(self) -> list[float]:
        """The loss of each optimiser step."""
        return [float(term) for term in self.terms]

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Wrap the source, to record or replace its first sequences."""
        own = module.source.mini_batches

        def watched(batch: Any, context: Any) -> Iterator[Any]:
            for text in own(batch, context):
                if self.first is not None:
                    yield text
                    continue
                self.first = text.to("cpu")
                yield text if self.replay is None else self.replay.to(module.device)

        module.source.mini_batches = watched

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """End the run after ``killed_after`` steps."""
        if module.global_step == self.killed_after:
            raise StoppedError

    def on_rollouts(self, trainer: Any, module: Any, trajectories: Any) -> None:
        """Record the first rollouts, if they come before the first optimiser step."""
        if self.rollouts is None and module.global_step == 0:
            self.rollouts = trajectories.to("cpu")

    def on_loss_terms(self, trainer: Any, module: Any, terms: Any) -> None:
        """Record the loss."""
        self.terms.append(terms["loss"])

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Record the full weights, as long as shards can still be gathered."""
        for name, parameter in module.student.named_parameters():
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            self.weights[name] = whole.detach().float().cpu()


def method(name: str, machine: Machine) -> dict[str, Any]:
    """A quickstart config with sizes reduced for a check.

    Args:
        name: name of the file in ``configs/``, without its suffix.
        machine: on a CPU the sizes are smaller.
    """
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    for role in {"student", "teacher", "reference"} & config["model"].keys():
        described = config["model"][role]
        if "class_path" in described:  # a teacher that has a model as its part
            described = described["init_args"]["teacher"]
        described["path"] = str(ASSETS / Path(described["path"]).name)
    for callback in config["trainer"].get("callbacks", []):
        others = callback.get("init_args", {}).get("others", {})
        others |= {name: str(ASSETS / Path(path).name) for name, path in others.items()}
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
    if "on_policy" in config:
        config["on_policy"] |= {"max_prompts": 8, "num_responses": 2, "k": [1], "max_new_tokens": 32}
    if "corpus" in data:
        data["corpus"] = {"num_documents": 500}
    return config


def changed(config: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config with some values changed.

    Args:
        config: nested dictionaries.
        keys: new values by dotted key, such as ``trainer.precision``.
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
    """Run ``steps`` optimiser steps and return the records; the result of an identical earlier run is reused.

    Args:
        machine: the device to run on, unless ``keys`` set another one.
        config: of the run.
        steps: number of optimiser steps.
        watch: callback that records the run. With a watch or a name, no earlier result is reused.
        name: name of the run's folder.
        keys: changed values of the config, by dotted key with ``__`` for the dot.
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
    """Run a command of the command line, and discard its output."""
    path = machine.folder / f"{word}.yaml"
    path.write_text(yaml.safe_dump(config))
    defaults = {"callbacks": [watch]} if watch else {}
    output = io.StringIO()
    with patch.object(sys, "argv", ["lit-distill"]), _environment(), redirect_stdout(output), redirect_stderr(output):
        try:
            return DistillCLI([word, "--config", str(path)], trainer_defaults=defaults)
        except SystemExit as exit_:
            raise RuntimeError(output.getvalue().strip() or "the command line rejected its config") from exit_


@contextmanager
def _environment() -> Iterator[None]:
    """Destroy the process group and restore its environment variables afterwards, so that runs do not affect each other."""
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
    """Absolute difference of two numbers, relative to ``reference``."""
    return abs(value - reference) / max(abs(reference), 1e-12)


def furthest(losses: list[float], others: list[float]) -> float:
    """The largest relative difference of two runs' losses; infinite if their number differs."""
    if len(losses) != len(others) or not losses:
        return float("inf")
    return max(map(relative, losses, others))


def distance(weights: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest difference of two students' weights, relative to the largest weight."""
    if weights.keys() != others.keys():
        raise ValueError(f"the students have different weight names: {sorted(weights.keys() ^ others.keys())[:4]}")
    largest = max(float(weight.abs().max()) for weight in weights.values())
    return max(float((weights[name] - others[name]).abs().max()) for name in weights) / largest
