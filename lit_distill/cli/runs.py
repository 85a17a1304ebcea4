"""Finds the folders and the `last` and `best` checkpoints of earlier runs, and continues the logs of a resumed run."""

from __future__ import annotations

import csv
from glob import escape
from pathlib import Path
from pickle import UnpicklingError

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only

from lit_distill.distributed.stored import META, rank_files, without_tensors
from lit_distill.files import LOCK_FILE, acquire_lock, lock_error, release_lock

UNREADABLE = (RuntimeError, OSError, EOFError, ValueError, KeyError, UnpicklingError)
"""What torch raises for a checkpoint that is not a zip file, is truncated, or contains code."""


def last_checkpoint(root: str | Path, name: str) -> Path | None:
    """The newest ``last`` checkpoint of all versions of a run, or None if there is none yet.

    Args:
        root: ``trainer.default_root_dir``.
        name: name of the run, which is its folder in ``root``.
    """
    found = Path(root).expanduser().glob(f"{escape(name)}/version_*/checkpoints/last*.ckpt")
    return max(found, key=_saved_at, default=None)


def check_checkpoint(path: Path) -> None:
    """Check that a path is a checkpoint of lit-distill with plain values and tensors; no code in a pickle is run.

    Raises:
        ValueError: with the key ``ckpt_path``.
    """
    advice = "Give a .ckpt file, or the folder of a sharded checkpoint, or one of best, last."
    if not path.exists():
        raise ValueError(f"ckpt_path: there is no {path}. {advice}")
    if path.is_dir() and not (path / META).is_file():
        raise ValueError(f"ckpt_path: {path} is a folder but not a checkpoint: it has no {META}. {advice}")
    try:
        content = without_tensors(path)
    except UNREADABLE as error:
        raise ValueError(
            f"ckpt_path: {path} cannot be read as a checkpoint of plain tensors; no code in it was run "
            f"({str(error).splitlines()[0]}). Give another one, such as one of {path.parent}/*.ckpt."
        ) from error
    if not isinstance(content, dict) or not {"state_dict", "student", "global_step"} <= content.keys():
        raise ValueError(
            f"ckpt_path: {path} is not a checkpoint of lit-distill. To start from the weights of a model, save it as a Hugging "
            "Face folder and set model.student.path."
        )
    if path.is_dir():
        try:
            rank_files(path, content)
        except ValueError as error:
            raise ValueError(f"ckpt_path: {error}") from error


def best_checkpoint(last: Path) -> Path:
    """The best checkpoint at the time when ``last`` was saved, searched in the folder of ``last``, which may have been moved.

    Raises:
        ValueError: if the run kept no best checkpoint, or its file is gone.
    """
    callbacks = without_tensors(last).get("callbacks", {})
    paths = [Path(state["best_model_path"]) for state in callbacks.values() if state.get("best_model_path")]
    for path in (last.parent / path.name for path in paths):
        if path.exists():
            return path
    raise ValueError(f"ckpt_path: there is no best checkpoint beside {last}. Give a .ckpt file, or `last`.")


def run_loggers(root: str | Path, name: str, continued: Path | None = None) -> list[Logger]:
    """TensorBoard and CSV loggers in a new version folder of the run, or in the version folder of a resumed checkpoint.

    Args:
        root: ``trainer.default_root_dir``.
        name: name of the run.
        continued: the checkpoint to resume; what was logged after it will be logged again, see `continue_log`.
    """
    if continued is None:
        version = _new_version(Path(root).expanduser() / name)
        return [TensorBoardLogger(root, name=name, version=version), CSVLogger(root, name=name, version=version)]
    step, folder = int(without_tensors(continued)["global_step"]), continued.parent.parent
    beside = CSVLogger(root, name=name, version=folder.name)
    return [TensorBoardLogger(root, name=name, version=folder.name, purge_step=step + 1), beside]


def continue_log(trainer: Trainer, checkpoint: Path) -> None:
    """On rank 0, keep the CSV rows that were logged before a checkpoint of the same folder.

    Raises:
        ValueError: with the key ``ckpt_path``, if another process is running there; nothing was changed.
    """
    folder, step = checkpoint.parent.parent, int(without_tensors(checkpoint)["global_step"])
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, CSVLogger) and Path(logger.log_dir).resolve() == folder.resolve():
            if not acquire_lock(folder / LOCK_FILE):
                raise lock_error(folder, "ckpt_path")
            _continue_csv(folder, logger, step)
            if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
                release_lock(folder / LOCK_FILE)  # the process that becomes rank 0 acquires it again


def _continue_csv(folder: Path, logger: CSVLogger, step: int) -> None:
    """Write the rows from before the checkpoint to a new file; the old file is renamed first, since the logger would delete it."""
    log, kept = folder / "metrics.csv", folder / ".metrics.csv.kept"
    if log.exists() and not kept.exists():  # otherwise an earlier start was killed in this function
        log.rename(kept)
    if not kept.exists():
        return
    with kept.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) < step or _is_before_checkpoint(row, step)]
    logger.experiment.metrics = [{key: value for key, value in row.items() if value} for row in rows]
    logger.save()
    kept.unlink()


def _new_version(run: Path) -> int:
    """Create the folder of a run's next version, never shared by two runs that start together; other ranks use rank 0's."""
    numbers = [path.name.removeprefix("version_") for path in run.glob("version_*")]
    newest = max((int(number) for number in numbers if number.isdigit()), default=-1)
    if getattr(rank_zero_only, "rank", 0):
        return max(newest, 0)
    while True:
        newest += 1
        try:
            (run / f"version_{newest}").mkdir(parents=True)
        except FileExistsError:  # another run created it
            continue
        return newest


def _is_before_checkpoint(row: dict[str, str], step: int) -> bool:
    """Whether a row was logged before the checkpoint of ``step``; a row of rollout metrics alone at this step came after it."""
    logged = {name for name, value in row.items() if value and name != "step"}
    return int(row["step"]) == step and not all(name.startswith("rollout/") for name in logged)


def _saved_at(checkpoint: Path) -> float:
    """When the checkpoint was complete: a sharded one is a folder, whose own time may be older than its files."""
    return max(path.stat().st_mtime for path in (checkpoint, *checkpoint.glob("*")))
