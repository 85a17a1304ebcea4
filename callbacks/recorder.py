"""Writes what was rolled out, response by response."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, Trainer

from lit_distill.atomic import write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from lit_distill.module import DistillationModule
    from lit_distill.rollouts import Trajectories


class RolloutRecorder(Callback):
    """Writes one record for each response: id, step, phase, prompt, response, finished, length, alpha, teacher_share, reward.

    ``step`` is the optimiser step after which the response was written, ``length`` its tokens, ``alpha`` the teacher's share in the
    sampler and ``teacher_share`` in the response, ``reward`` the sum of its rewards; the last is null where the source gives none.
    Each rank that has items of its own writes files of its own: JSONL ``rollouts-rank0.jsonl``, Parquet a file for each phase. A
    resumed run first drops what was recorded after its checkpoint, so that no phase is there twice.

    Args:
        path: folder; ``rollouts`` in the run's log folder by default, which ``--ckpt_path last`` goes on in. To continue from a
            checkpoint that is named by its file, name the folder here.
        every_n_phases: record every n-th phase.
        format: jsonl or parquet.
        tokens: also record the response's token ids, as ``tokens``.
        signals: also record what is known of each token, by name: ``old_logprobs``, and of scored rollouts
            ``teacher_logprobs``, ``rewards``, ``advantages``, weights, entropies and ``from_teacher``.
    """

    def __init__(
        self,
        path: str | None = None,
        every_n_phases: int = 1,
        format: Literal["jsonl", "parquet"] = "jsonl",  # noqa: A002 - the YAML's key
        tokens: bool = False,
        signals: bool = False,
    ) -> None:
        if every_n_phases < 1:
            raise ValueError(f"RolloutRecorder.every_n_phases: expected at least 1, got {every_n_phases}.")
        if format not in ("jsonl", "parquet"):
            raise ValueError(f"RolloutRecorder.format: expected jsonl or parquet, got {format!r}.")
        self.path = path
        self.every_n_phases = every_n_phases
        self.format = format
        self.tokens = tokens
        self.signals = signals
        self._phases = 0
        self._folder = Path()

    @property
    def state_key(self) -> str:
        """Two recorders may stand side by side."""
        return self._generate_state_key(path=self.path, format=self.format)

    def state_dict(self) -> dict[str, Any]:
        """The number of phases so far."""
        return {"phases": self._phases}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._phases = state_dict["phases"]

    def on_train_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Drop what will be rolled out again.

        Raises:
            ValueError: if a new run finds the records of another.
        """
        self._folder = Path(self.path or Path(trainer.log_dir or ".") / "rollouts")
        step = pl_module.global_step
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"RolloutRecorder.path: {self._folder} is no folder to write to ({error.strerror}). Give another."
            ) from error
        files = sorted(self._folder.glob(f"rollouts-*rank*.{self.format}"))
        if step == 0 and any(file.stat().st_size for file in files):
            raise ValueError(
                f"RolloutRecorder.path: {self._folder} holds the rollouts of another run. Give another path, remove the files, or "
                "resume that run with --ckpt_path."
            )
        share = pl_module.data_ranks
        trainer.strategy.barrier("rollouts of others")  # nobody writes before all have looked
        for file in files:
            if not share.repeats and _rank_of(file) % share.number == share.rank:  # there may have been more ranks
                _drop_from(file, step)
        trainer.strategy.barrier("rollouts to be repeated")

    def on_rollouts(self, trainer: Trainer, pl_module: DistillationModule, trajectories: Trajectories) -> None:
        """Record the phase if its turn has come."""
        phase, self._phases = self._phases, self._phases + 1
        share = pl_module.data_ranks
        if phase % self.every_n_phases == 0 and trajectories.ids and not share.repeats:
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
        hidden_left = replace(trajectories, responses=replace(trajectories.responses, teacher_hidden=None))
        local = hidden_left.to("cpu")
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
                **({"tokens": responses.ids[row][here].tolist()} if self.tokens else {}),
                **({name: _floats(values[row][here]) for name, values in per_token.items()} if self.signals else {}),
            }


def _floats(values: Tensor) -> list[float]:
    listed: list[float] = values.float().tolist()
    return listed


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """The record without NaN and infinity, which JSON has not: null instead."""

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
    }  # said, since a column of nulls or empty lists has no type of its own  # fmt: skip
    schema = pa.schema([(name, known.get(name, pa.list_(pa.float32()))) for name in records[0]])
    write_whole(path, lambda unfinished: pq.write_table(pa.Table.from_pylist(records, schema), unfinished))


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
            # Only a killed run leaves a line without an end, and its checkpoint is older than that line.
            out.writelines(line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] < step)

    write_whole(file, keep)
