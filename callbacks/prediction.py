"""Writes the records of `predict` batch by batch, so that a killed run can continue where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_distill.files import LOCK_FILE, acquire_lock, release_lock
from lit_distill.types import ArgumentError, arguments_of

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule

LINE_START = b'{"id": "'
"""The first bytes of every line."""


class PredictionWriter(Callback):
    """Appends the records of ``predict`` to the JSONL file ``model.prediction.path``.

    Items whose id is already in the file are not generated again; an incomplete last line, left by a killed run, is removed
    first. The file is locked during the run, so that no second run writes the same lines.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None
        self._weights: set[str] = set()  # of the responses that are in the file

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Lock the file, and read which items are done, before any weights load."""
        if stage != "predict":
            return
        path = Path(pl_module.prediction.path)
        if path.is_dir():
            raise ArgumentError(pl_module.prediction, f"path: {path} is a folder. Give the name of a .jsonl file.")
        locked_by_other = False
        if trainer.is_global_zero:
            locked_by_other = not acquire_lock(_lock_file(path))
            self._file = None if locked_by_other else path.open("a", encoding="utf-8")
        if trainer.strategy.broadcast(locked_by_other):  # so that all ranks stop
            raise ArgumentError(
                pl_module.prediction,
                f"path: another `predict` is writing to {path}. Wait until it ends, or give another path.",
            )
        if path.exists():
            with arguments_of(pl_module.prediction):
                records = _read(path)
            _check_same_model(path, records, pl_module)
            self._weights = {record["weights"] for record in records} - {None}
            pl_module.predicted = {record["id"]: record["prompt"] for record in records}
            if pl_module.predicted:
                rank_zero_info(
                    f"{path}: {len(pl_module.predicted)} items are already done and are not generated again."
                )
        trainer.strategy.barrier("predictions")  # all ranks have read and checked the file
        if trainer.is_global_zero:
            _drop_incomplete_line(path)

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Refuse a file with responses of other weights, now that it is known which the Trainer has loaded."""
        if self._weights and self._weights != {pl_module.prediction_weights}:
            given = pl_module.prediction
            from_checkpoint = " and ckpt_path" if given.model == "student" else ""
            raise ArgumentError(
                given,
                f"path: {given.path} contains responses of another {given.model}: its weights are not those of "
                f"model.{given.model}.path{from_checkpoint}. Give another path, or remove the file.",
            )

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: DistillationModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append the records of all ranks."""
        records: Sequence[dict[str, Any]] = outputs
        if trainer.world_size > 1:
            shares: list[Any] = [None] * pl_module.data_ranks.number
            dist.all_gather_object(shares, outputs, pl_module.data_ranks.group)
            records = [record for share in shares for record in share]
        if self._file is not None and records:
            self._file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            self._file.flush()
        if trainer.received_sigterm:  # Lightning stops `fit` only
            raise SIGTERMException

    def on_predict_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Log the path of the file."""
        rank_zero_info(f"Predictions: {pl_module.prediction.path}")

    def teardown(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Close the file, and release its lock."""
        if self._file is not None:
            self._file.close()
            self._file = None
            release_lock(_lock_file(Path(pl_module.prediction.path)))

    def on_exception(self, trainer: Trainer, pl_module: DistillationModule, exception: BaseException) -> None:
        """Close the file, and release its lock."""
        self.teardown(trainer, pl_module, "")


def _check_same_model(path: Path, records: Sequence[dict[str, Any]], module: DistillationModule) -> None:
    """Refuse to go on with what the other model has written, or the same with other settings."""
    given = module.prediction
    other = {record["model"] for record in records} - {given.model}
    if other:
        raise ArgumentError(
            given,
            f"path: {path} contains responses of the {other.pop()}, but model is {given.model}. "
            "Give another path, or remove the file.",
        )
    now = given.sampling_settings()
    if otherwise := [record["decoding"] for record in records if record["decoding"] not in (None, now)]:
        changed = [name for name in now if otherwise[0].get(name) != now[name]]
        raise ArgumentError(
            given,
            f"path: {path} contains responses with {_listed(otherwise[0], changed)}, but now "
            f"{_listed(now, changed)} is set. Give another path, or the same settings.",
        )


def _listed(settings: dict[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {settings.get(name)}" for name in names)


def _read(path: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    try:
        with path.open("rb") as lines:
            for line in lines:
                if _is_incomplete(line):
                    break
                record = json.loads(line)
                model = record["model"] if "model" in record else record["speaker"]  # the key until version 0.1
                known = {"id": record["id"], "model": model}
                known |= {key: record.get(key) for key in ("decoding", "prompt", "weights")}
                if line.endswith(b"\n"):
                    records.append(known)
    except (ValueError, KeyError, TypeError) as error:  # not JSON in UTF-8, or other records
        raise ValueError(
            f"path: {path}, line {len(records) + 1} was not written by `predict`. Give another path, or remove "
            "the file."
        ) from error
    return records


def _is_incomplete(line: bytes) -> bool:
    """Whether this is an incomplete record, left by a killed run."""
    if line.endswith(b"\n") or line[: len(LINE_START)] != LINE_START[: len(line)]:
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _drop_incomplete_line(path: Path) -> None:
    if not path.exists() or not path.stat().st_size:
        return
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}{LOCK_FILE}")
