"""Where the earlier runs of a config lie, which checkpoint `last` and `best` mean, and how a run's logs go on."""

from __future__ import annotations

import csv
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only

from lit_distill.occupied import leave, occupies, refusal
from lit_distill.parallel.reading import META, rank_files

UNREADABLE = (RuntimeError, OSError, EOFError, ValueError, KeyError, UnpicklingError)
"""What torch raises at a checkpoint that is no zip file, cut off, or holds code."""


def last_checkpoint(root: str | Path, name: str) -> Path | None:
    """The newest ``last`` checkpoint of all versions of a run, or None before there is one.

    Args:
        root: ``trainer.default_root_dir``.
        name: of the run: the folder below it.
    """
    found = Path(root).expanduser().glob(f"{name}/version_*/checkpoints/last*.ckpt")
    return max(found, key=_saved_at, default=None)


def check_checkpoint(path: Path) -> None:
    """Look whether there is a checkpoint of plain tensors, from a run of ours; whatever code a pickle holds is not run.

    Raises:
        ValueError: naming ``ckpt_path``.
    """
    advice = "Give a .ckpt file, or the folder of a sharded checkpoint, or one of best, last."
    if not path.exists():
        raise ValueError(f"ckpt_path: there is no {path}. {advice}")
    if path.is_dir() and not (path / META).is_file():
        raise ValueError(f"ckpt_path: {path} is a folder and no checkpoint, for it has no {META}. {advice}")
    try:
        said = without_tensors(path)
    except UNREADABLE as error:
        raise ValueError(
            f"ckpt_path: {path} cannot be read as a checkpoint of plain tensors, and nothing else in it was run "
            f"({str(error).splitlines()[0]}). Give another one; the run keeps {path.parent}/*.ckpt."
        ) from error
    if not isinstance(said, dict) or not {"state_dict", "student", "global_step"} <= said.keys():
        raise ValueError(
            f"ckpt_path: {path} is no checkpoint of lit-distill. To start from the weights of a model, save it as a Hugging Face "
            "folder and set model.student.path."
        )
    if path.is_dir():
        try:
            rank_files(path, said)
        except ValueError as error:
            raise ValueError(f"ckpt_path: {error}") from error


def best_checkpoint(last: Path) -> Path:
    """The best checkpoint that a run had seen when ``last`` was saved, wherever its folder stands today.

    Raises:
        ValueError: if the run kept none, or it is gone.
    """
    callbacks = without_tensors(last).get("callbacks", {})
    paths = [Path(state["best_model_path"]) for state in callbacks.values() if state.get("best_model_path")]
    for path in (last.parent / path.name for path in paths):
        if path.exists():
            return path
    raise ValueError(f"ckpt_path: {last} knows of no best checkpoint beside it. Give a .ckpt file, or `last`.")


def run_loggers(root: str | Path, name: str, continued: Path | None = None) -> list[Logger]:
    """TensorBoard and CSV beside it, in a new version of the run; or in that of a checkpoint, from its step on.

    Args:
        root: ``trainer.default_root_dir``.
        name: of the run.
        continued: the checkpoint to go on from; what was logged after it will be logged again, see `continue_log`.
    """
    if continued is None:
        version = _new_version(Path(root).expanduser() / name)
        return [TensorBoardLogger(root, name=name, version=version), CSVLogger(root, name=name, version=version)]
    step, folder = int(without_tensors(continued)["global_step"]), continued.parent.parent
    beside = CSVLogger(root, name=name, version=folder.name)
    return [TensorBoardLogger(root, name=name, version=folder.name, purge_step=step + 1), beside]


def continue_log(trainer: Trainer, checkpoint: Path) -> None:
    """Let rank 0 write again what was logged in CSV before a checkpoint of the same folder.

    Raises:
        ValueError: naming ``ckpt_path``, if another process is running there; nothing was touched.
    """
    folder, step = checkpoint.parent.parent, int(without_tensors(checkpoint)["global_step"])
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, CSVLogger) and Path(logger.log_dir).resolve() == folder.resolve():
            if not occupies(folder):
                raise refusal(folder, "ckpt_path")
            _continue_csv(folder, logger, step)
            if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
                leave(folder)  # to a process that will be rank 0


def _continue_csv(folder: Path, logger: CSVLogger, step: int) -> None:
    """Write again what was logged before the checkpoint; the old file, which the logger would delete, stays until that is done."""
    log, kept = folder / "metrics.csv", folder / ".metrics.csv.kept"
    if log.exists() and not kept.exists():  # else an earlier start was killed in here
        log.rename(kept)
    if not kept.exists():
        return
    with kept.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) < step or _is_of_the_past(row, step)]
    logger.experiment.metrics = [{key: value for key, value in row.items() if value} for row in rows]
    logger.save()
    kept.unlink()


def _new_version(run: Path) -> int:
    """Make the folder of a run's next version, which two runs that start at once do not share; other ranks find rank 0's."""
    numbers = [path.name.removeprefix("version_") for path in run.glob("version_*")]
    newest = max((int(number) for number in numbers if number.isdigit()), default=-1)
    if getattr(rank_zero_only, "rank", 0):
        return max(newest, 0)
    while True:
        newest += 1
        try:
            (run / f"version_{newest}").mkdir(parents=True)
        except FileExistsError:  # another run's
            continue
        return newest


def _is_of_the_past(row: dict[str, str], step: int) -> bool:
    """Whether a row was logged before the checkpoint of ``step``; that of rollouts, which come before a step, was after it."""
    logged = {name for name, value in row.items() if value and name != "step"}
    return int(row["step"]) == step and not all(name.startswith("rollout/") for name in logged)


def without_tensors(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says, with tensors that hold nothing."""
    state = checkpoint / META if checkpoint.is_dir() else checkpoint
    said: dict[str, Any] = torch.load(state, map_location="meta", weights_only=True, mmap=True)
    return said


def _saved_at(checkpoint: Path) -> float:
    """When it was complete: a sharded one is a folder, whose own time may be older."""
    return max(path.stat().st_mtime for path in (checkpoint, *checkpoint.glob("*")))
