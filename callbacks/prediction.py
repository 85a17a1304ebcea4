"""Writes what `predict` says, line by line, so that a killed run can go on where it stopped."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule

BEGINNING = b'{"id": "'
"""Of every line."""


class PredictionWriter(Callback):
    """Appends the records of ``predict`` to the JSONL file ``model.prediction.path``.

    Items whose id is in the file already are not generated again; a last line that a kill cut in two is removed first. The
    file is locked while the run lasts, so that no second one writes the same lines; on Windows it is not.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Take the file, and read which items are done, before any weights load."""
        if stage != "predict":
            return
        path = Path(pl_module.prediction.path)
        if path.is_dir():
            raise ValueError(f"model.prediction.path: {path} is a folder. Give the name of a .jsonl file.")
        taken = False
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
            taken = not _locks(self._file)
        if trainer.strategy.broadcast(taken):  # so that all ranks stop
            raise ValueError(
                f"model.prediction.path: another `predict` is writing to {path}. Wait for its end, or give another path."
            )
        if path.exists():
            records = _read(path)
            other = {record["speaker"] for record in records} - {pl_module.prediction.speaker}
            if other:
                raise ValueError(
                    f"model.prediction.path: {path} holds what the {other.pop()} said, and now the "
                    f"{pl_module.prediction.speaker} is to speak. Give another path, or remove the file."
                )
            now = pl_module.prediction.drawn_by()
            if otherwise := [record["decoding"] for record in records if record["decoding"] not in (None, now)]:
                changed = [name for name in now if otherwise[0].get(name) != now[name]]
                raise ValueError(
                    f"model.prediction.path: {path} holds responses with {_listed(otherwise[0], changed)}, and now "
                    f"{_listed(now, changed)} is asked for. Give another path, or the same settings."
                )
            pl_module.predicted_ids = frozenset(record["id"] for record in records)
            if pl_module.predicted_ids:
                rank_zero_info(
                    f"{path}: {len(pl_module.predicted_ids)} items are there already and are left as they are."
                )
        trainer.strategy.barrier("predictions")  # all have read it, and it is known to be ours
        if trainer.is_global_zero:
            _drop_broken_end(path)

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
            everyone: list[Any] = [None] * pl_module.data_ranks.number
            dist.all_gather_object(everyone, outputs, pl_module.data_ranks.group)
            records = [record for share in everyone for record in share]
        if self._file is not None and records:
            self._file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            self._file.flush()

    def on_predict_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Say where the file is."""
        rank_zero_info(f"Predictions: {pl_module.prediction.path}")

    def teardown(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Give the file back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def on_exception(self, trainer: Trainer, pl_module: DistillationModule, exception: BaseException) -> None:
        """Give the file back."""
        self.teardown(trainer, pl_module, "")


def _locks(file: IO[str]) -> bool:
    """Whether nobody else has the file; then it is ours until it is closed or the process ends, in whatever way."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # not every network's file system knows locks
        rank_zero_warn(
            f"model.prediction.path: {file.name} cannot be locked ({error.strerror}), so do not start two runs on it."
        )
    return True


def _listed(settings: dict[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {settings.get(name)}" for name in names)


def _read(path: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    try:
        with path.open("rb") as lines:
            for line in lines:
                if _was_cut(line):
                    break
                record = json.loads(line)
                known = {"id": record["id"], "speaker": record["speaker"], "decoding": record.get("decoding")}
                if line.endswith(b"\n"):
                    records.append(known)
    except (ValueError, KeyError, TypeError) as error:  # no JSON in UTF-8, or a record of something else
        raise ValueError(
            f"model.prediction.path: {path}, line {len(records) + 1} was not written by `predict`. Give another path, or remove "
            "the file."
        ) from error
    return records


def _was_cut(line: bytes) -> bool:
    """Whether this is the first part of a record, which a kill has cut in two."""
    if line.endswith(b"\n") or line[: len(BEGINNING)] != BEGINNING[: len(line)]:
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _drop_broken_end(path: Path) -> None:
    if not path.exists() or not path.stat().st_size:
        return
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
