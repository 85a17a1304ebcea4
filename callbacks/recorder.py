"""Writes the responses of rollouts to files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, Trainer

from lit_distill.files import atomic_write
from lit_distill.types import ArgumentError, check_sizes

if TYPE_CHECKING:
    from torch import Tensor

    from lit_distill.module import DistillationModule
    from lit_distill.types import Trajectories


class RolloutRecorder(Callback):
    """Writes one record for each response: id, step, phase, prompt, response, finished, length, alpha, teacher_share, reward.

    ``step`` is the optimiser step after which the response was generated, ``length`` its number of tokens, ``alpha`` the teacher's
    share in the sampling distribution, ``teacher_share`` the share of tokens from the teacher, and ``reward`` the sum of its
    rewards, null if the source gives none; rewards of the user's own are ``score_NAME``. Each data rank writes its own files: one
    JSONL file ``rollouts-rank0.jsonl``, or one Parquet file for each phase. A resumed run first drops the records after its
    checkpoint, so that no phase is recorded twice.

    Args:
        path: folder; by default ``rollouts`` in the run's log folder, which ``--ckpt_path last`` continues. To resume from a
            checkpoint that is given by its file name, set the folder here.
        every_n_phases: record every n-th phase.
        format: jsonl or parquet.
        tokens: also record the response's token ids, as ``tokens``.
        signals: also record the values of each token, by name: ``old_logprobs``, and of scored rollouts
            ``teacher_logprobs``, ``rewards``, ``advantages``, weights, entropies and ``from_teacher``.
    """

    reads_entropies = True

    def __init__(
        self,
        path: str | None = None,
        every_n_phases: int = 1,
        format: Literal["jsonl", "parquet"] = "jsonl",  # noqa: A002 - the YAML's key
        tokens: bool = False,
        signals: bool = False,
    ) -> None:
        check_sizes(every_n_phases=every_n_phases)
        if format not in ("jsonl", "parquet"):
            raise ValueError(f"format: expected jsonl or parquet, got {format!r}.")
        self.path = path
        self.every_n_phases = every_n_phases
        self.format = format
        self.tokens = tokens
        self.signals = signals
        self._phases = 0
        self._folder = Path()

    @property
    def state_key(self) -> str:
        """A key for each path and format, since a run may have several recorders."""
        return self._generate_state_key(path=self.path, format=self.format)

    def state_dict(self) -> dict[str, Any]:
        """The number of phases so far."""
        return {"phases": self._phases}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of phases."""
        self._phases = state_dict["phases"]

    def on_train_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Drop the records of rollouts that this run will repeat.

        Raises:
            ValueError: if the folder of a new run contains records of another run.
        """
        self._folder = Path(self.path or Path(trainer.log_dir or ".") / "rollouts")
        step = pl_module.global_step
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(
                self, f"path: {self._folder} is not a writable folder ({error.strerror}). Give another."
            ) from error
        files = sorted(self._folder.glob(f"rollouts-*rank*.{self.format}"))
        if step == 0 and any(file.stat().st_size for file in files):
            raise ArgumentError(
                self,
                f"path: {self._folder} contains the rollouts of another run. Give another path, remove the files, "
                "or resume that run with --ckpt_path.",
            )
        share = pl_module.data_ranks
        trainer.strategy.barrier("rollouts of others")  # no rank writes before all have checked
        for file in files:
            if (
                not share.is_replica and _rank_of(file) % share.number == share.rank
            ):  # the earlier run may have had more ranks
                _drop_from(file, step)
        trainer.strategy.barrier("rollouts to be repeated")

    def on_rollouts(self, trainer: Trainer, pl_module: DistillationModule, trajectories: Trajectories) -> None:
        """Record every n-th phase."""
        phase, self._phases = self._phases, self._phases + 1
        share = pl_module.data_ranks
        if phase % self.every_n_phases == 0 and trajectories.ids and not share.is_replica:
            records = list(self._records(pl_module, trajectories, phase))
            if self.format == "jsonl":
                lines = [json.dumps(_finite(record), ensure_ascii=False) + "\n" for record in records]
                with (self._folder / f"rollouts-rank{share.rank}.jsonl").open("a", encoding="utf-8") as file:
                    file.write("".join(lines))
            else:
                when = f"step{pl_module.global_step:09d}-phase{phase:09d}"
                _write_parquet(records, self._folder / f"rollouts-{when}-rank{share.rank}.parquet")

    def _records(
        self, pl_module: DistillationModule, trajectories: Trajectories, phase: int
    ) -> Iterator[dict[str, Any]]:
        without_hidden = replace(trajectories, responses=replace(trajectories.responses, teacher_hidden=None))
        local = without_hidden.to("cpu")
        responses, mask = local.responses, local.responses.mask
        per_token = {"old_logprobs": responses.logprobs, **local.signals}
        extra = {name: getattr(responses, name) for name in ("from_teacher", "student_entropy", "teacher_entropy")}
        per_token |= {name: values for name, values in extra.items() if values is not None}
        rewards, from_teacher = local.signals.get("rewards"), responses.from_teacher
        finished, texts = responses.finished(pl_module.stop_ids).tolist(), pl_module.response_texts(responses)
        for row, (item, prompt) in enumerate(zip(local.ids, local.prompt_texts, strict=True)):
            here = mask[row]
            length = int(here.sum())
            share = local.alpha if from_teacher is None else int(from_teacher[row].sum()) / max(length, 1)
            yield {
                "id": item,
                "step": pl_module.global_step,
                "phase": phase,
                "prompt": prompt,
                "response": texts[row],
                "finished": finished[row],
                "length": length,
                "alpha": local.alpha,
                "teacher_share": share,
                "reward": None if rewards is None else float(rewards[row][here].sum()),
                **{f"score_{name}": float(values[row]) for name, values in local.scores.items()},
                **({"tokens": responses.ids[row][here].tolist()} if self.tokens else {}),
                **({name: _floats(values[row][here]) for name, values in per_token.items()} if self.signals else {}),
            }


def _floats(values: Tensor) -> list[float]:
    listed: list[float] = values.float().tolist()
    return listed


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity, which JSON does not have, by null."""

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: clean(value) for name, value in record.items()}


def _write_parquet(records: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = {
        "step": pa.int64(), "phase": pa.int64(), "length": pa.int64(), "finished": pa.bool_(), "alpha": pa.float64(),
        "teacher_share": pa.float64(), "reward": pa.float64(), "tokens": pa.list_(pa.int64()),
        **dict.fromkeys(("id", "prompt", "response"), pa.string()),
    }  # explicit types, since a column of nulls or empty lists has none  # fmt: skip
    known |= {name: pa.float64() for name in records[0] if name.startswith("score_")}
    schema = pa.schema([(name, known.get(name, pa.list_(pa.float32()))) for name in records[0]])
    atomic_write(path, lambda unfinished: pq.write_table(pa.Table.from_pylist(records, schema), unfinished))


def _rank_of(file: Path) -> int:
    return int(file.stem.rpartition("-rank")[2])


def _drop_from(file: Path, step: int) -> None:
    """Remove the records of rollouts after ``step`` or more optimiser steps."""
    if file.suffix == ".parquet":
        if int(file.stem.split("-")[1].removeprefix("step")) >= step:
            file.unlink()
        return

    def keep(unfinished: Path) -> None:
        with file.open("rb") as lines, unfinished.open("wb") as out:
            # Only a killed run leaves a line without a newline, and its checkpoint is older than that line.
            out.writelines(line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] < step)

    atomic_write(file, keep)
