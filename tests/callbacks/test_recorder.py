"""What is recorded of rollouts is what was shown, once each, also after a resume."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import datasets
import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from training import learner_of, quiet_trainer

from lit_distill.callbacks import RolloutRecorder
from lit_distill.data import ProceduralData
from lit_distill.objectives import ForwardKL, PolicyGradient, ReverseKL
from lit_distill.sources import StudentRollouts, TeacherMixedRollouts

PHASE, STEPS_PER_PHASE = 4, 2


class Witness(L.Callback):
    """Keeps what it is shown, with the step."""

    def __init__(self) -> None:
        self.seen = []

    def on_rollouts(self, trainer, pl_module, trajectories) -> None:
        self.seen.append((pl_module.global_step, trajectories))


def fit(pair: tuple[Path, Path], root: Path, recorder: RolloutRecorder, steps=6, on_policy=False, resume=None):
    """Phases of two steps each, two phases in an epoch."""
    objectives = {"long": PolicyGradient(), "single": ReverseKL(importance_weighted=True)}
    source = TeacherMixedRollouts(alpha=0.3, max_new_tokens=9, mini_batch_size=2, inner_epochs=1, seed=5)
    if on_policy:
        objectives, source = {"kl": ForwardKL()}, StudentRollouts(max_new_tokens=9, seed=5)
    learner, witness = learner_of(pair, objectives, source), Witness()
    saved = ModelCheckpoint(root, save_last=True, save_on_train_epoch_end=True)
    trainer = quiet_trainer(root, steps, callbacks=[recorder, witness, saved], enable_checkpointing=True)
    data = ProceduralData(num_train=2 * PHASE, num_validation=4, num_test=4, batch_size=PHASE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*dirpath.*|.*Checkpoint directory.*|.*ckpt_path.*")
        trainer.fit(learner, data, ckpt_path=resume)
    return learner, witness.seen


def lines(folder: Path) -> list[dict]:
    (file,) = folder.iterdir()
    assert file.name == "rollouts-rank0.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def expected(learner, seen) -> list[dict]:
    """A plain loop over what was shown."""
    rows = []
    for phase, (step, shown) in enumerate(seen):
        responses = shown.responses
        for i, item in enumerate(shown.ids):
            length = max((t + 1 for t in range(responses.mask.shape[1]) if responses.mask[i, t]), default=0)
            tokens = responses.ids[i, :length].tolist()
            rows.append(
                {
                    "id": item,
                    "step": step,
                    "phase": phase,
                    "prompt": shown.prompt_texts[i],
                    "response": learner.tokenizer.decode(tokens, skip_special_tokens=True),
                    "finished": tokens[-1] in learner.stop_ids,
                    "length": length,
                    "alpha": 0.3,
                    "teacher_share": pytest.approx(responses.from_teacher[i, :length].float().mean().item()),
                    "reward": pytest.approx(shown.signals["rewards"][i, :length].double().sum().item(), rel=1e-5),
                    "tokens": tokens,
                    **{name: pytest.approx(v[i, :length].tolist()) for name, v in shown.signals.items()},
                    "student_entropy": pytest.approx(responses.student_entropy[i, :length].tolist()),
                    "teacher_entropy": pytest.approx(responses.teacher_entropy[i, :length].tolist()),
                    "from_teacher": responses.from_teacher[i, :length].float().tolist(),
                }
            )
    return rows


def test_what_was_recorded_equals_the_trajectories_shown(pair, tmp_path) -> None:
    recorder = RolloutRecorder(str(tmp_path / "rollouts"), tokens=True, signals=True)
    learner, seen = fit(pair, tmp_path, recorder)
    assert [step for step, _ in seen] == [0, STEPS_PER_PHASE, 2 * STEPS_PER_PHASE]
    assert lines(tmp_path / "rollouts") == expected(learner, seen)


def test_parquet_reads_back_with_datasets_and_holds_the_same(pair, tmp_path) -> None:
    learner, seen = fit(
        pair, tmp_path, RolloutRecorder(str(tmp_path / "r"), format="parquet", tokens=True, signals=True)
    )
    files = sorted(map(str, (tmp_path / "r").iterdir()))
    assert len(files) == len(seen)
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert table.to_list() == expected(learner, seen)


def test_a_source_that_does_not_score_has_no_reward(pair, tmp_path) -> None:
    for kind in ("jsonl", "parquet"):
        fit(pair, tmp_path, RolloutRecorder(str(tmp_path / kind), format=kind), steps=2, on_policy=True)
    recorded = lines(tmp_path / "jsonl")
    assert {(row["alpha"], row["teacher_share"], row["reward"]) for row in recorded} == {(0.0, 0.0, None)}
    files = str(tmp_path / "parquet" / "*.parquet")
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert table.to_list() == recorded


def test_every_second_phase_is_recorded_and_a_resumed_run_goes_on_counting(pair, tmp_path) -> None:
    def recorder() -> RolloutRecorder:
        return RolloutRecorder(str(tmp_path / "r"), every_n_phases=2)

    fit(pair, tmp_path, recorder(), steps=2)
    fit(pair, tmp_path, recorder(), steps=6, resume=tmp_path / "last.ckpt")
    assert [(row["phase"], row["step"]) for row in lines(tmp_path / "r")] == [(0, 0)] * PHASE + [(2, 4)] * PHASE


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_resumed_run_duplicates_nothing(pair, tmp_path, kind) -> None:
    def recorded(folder: Path) -> list:
        if kind == "jsonl":
            return lines(folder)
        files = str(folder / "*.parquet")
        cache = str(tmp_path / "cache")
        return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache).to_list()

    folder, checkpoint = tmp_path / "r", tmp_path / "early.ckpt"
    fit(pair, tmp_path, RolloutRecorder(str(folder), format=kind), steps=4)
    (tmp_path / "last.ckpt").rename(checkpoint)
    before = recorded(folder)
    # What a run killed after its third phase leaves behind: that phase, and half a line.
    fit(pair, tmp_path, RolloutRecorder(str(folder), format=kind), steps=6, resume=checkpoint)
    if kind == "jsonl":
        with (folder / "rollouts-rank0.jsonl").open("a") as file:
            file.write('{"id": "half a li')
    assert len(list(folder.iterdir())) == (1 if kind == "jsonl" else 3)
    _, seen = fit(pair, tmp_path, RolloutRecorder(str(folder), format=kind), steps=8, resume=checkpoint)
    after = recorded(folder)
    assert after[: 2 * PHASE] == before
    assert [(row["phase"], row["step"]) for row in after] == [
        (phase, 2 * phase) for phase in range(4) for _ in range(PHASE)
    ]
    assert [row["id"] for row in after[2 * PHASE :]] == [item for _, shown in seen for item in shown.ids]


def test_a_new_run_does_not_touch_the_records_of_another(pair, tmp_path) -> None:
    fit(pair, tmp_path, RolloutRecorder(str(tmp_path / "r")), steps=2)
    before = lines(tmp_path / "r")
    with pytest.raises(ValueError, match=r"^path.*another run"):
        fit(pair, tmp_path, RolloutRecorder(str(tmp_path / "r")), steps=2)
    assert lines(tmp_path / "r") == before


def test_errors_name_the_key(pair, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^every_n_phases.*got 0"):
        RolloutRecorder(every_n_phases=0)
    with pytest.raises(ValueError, match=r"^format.*'csv'"):
        RolloutRecorder(format="csv")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^path: .* is not a writable folder"):
        fit(pair, tmp_path, RolloutRecorder(str(tmp_path / "file")), steps=2)


def test_not_a_number_is_null_in_json(pair, tmp_path, monkeypatch) -> None:
    def poison(self, trainer, pl_module, trajectories) -> None:
        trajectories.signals["rewards"][0, 0] = float("nan")
        record(self, trainer, pl_module, trajectories)

    record = RolloutRecorder.on_rollouts
    monkeypatch.setattr(RolloutRecorder, "on_rollouts", poison)
    fit(pair, tmp_path, RolloutRecorder(str(tmp_path / "r"), signals=True), steps=2)
    first = lines(tmp_path / "r")[0]
    assert first["reward"] is None
    assert first["rewards"][0] is None
    assert "NaN" not in (tmp_path / "r" / "rollouts-rank0.jsonl").read_text()
