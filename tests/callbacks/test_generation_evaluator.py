"""Several seeds, speakers and lengths of reference, and checkpoints selected by what was generated."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev

import lightning as L
import pytest
import torch
from command_line import run, tiny_config, write
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import ASSETS

from lit_distill.callbacks import GenerationEvaluator
from lit_distill.data import ProceduralData
from lit_distill.evaluation import text_metrics as generation
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import NextToken

NAMES = ("rouge_l", "exact_match", "response_length", "unfinished", "distinct_1", "repetition_4")
SAMPLED = ("--generation.temperature", "1.0", "--generation.max_new_tokens", "12")


def evaluator(cli) -> GenerationEvaluator:
    return next(c for c in cli.trainer.callbacks if isinstance(c, GenerationEvaluator))


def test_run(pair, folder: Path, *more):
    config = tiny_config(pair)
    config["data"]["init_args"]["num_test"] = 9
    return run("test", "--config", write(config, folder / "x.yaml"), *SAMPLED, *more)


test_run.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def tested(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("test")
    buckets = ("--generation.reference_lengths", "[2, 4]", "--generation.num_samples", 3)
    return test_run(pair, folder, "--generation.seeds", "[10, 20]", *buckets, "--trainer.default_root_dir", folder)


@pytest.mark.slow
def test_several_seeds_are_the_mean_and_the_standard_deviation_of_single_ones(tested, pair, tmp_path) -> None:
    several = tested.trainer.callback_metrics
    single = [
        test_run(pair, tmp_path, "--generation.seed", seed, "--trainer.logger", "false").trainer.callback_metrics
        for seed in (10, 20)
    ]
    for name in (f"test/{who}{name}" for who in ("", "teacher_") for name in NAMES):
        values = [float(figures[name]) for figures in single]
        assert float(several[name]) == pytest.approx(fmean(values), abs=1e-5), name
        assert float(several[f"{name}_std"]) == pytest.approx(stdev(values), abs=1e-5), name
    assert len({float(figures["test/distinct_1"]) for figures in single}) > 1
    assert "test/rouge_l_std" not in single[0]


def test_the_teacher_answers_as_it_does_where_it_is_the_student(tested, pair, tmp_path) -> None:
    seeds = ("--generation.seeds", "[10, 20]", "--generation.teacher", "false", "--trainer.logger", "false")
    swapped = test_run(pair, tmp_path, *seeds, "--model.student.path", pair[1]).trainer.callback_metrics
    assert not [name for name in swapped if "teacher_rouge" in name]
    for name in NAMES:
        assert float(tested.trainer.callback_metrics[f"test/teacher_{name}"]) == float(swapped[f"test/{name}"])


def test_the_report_has_both_speakers_their_buckets_and_the_same_prompts(tested) -> None:
    report = evaluator(tested).report()
    json.dumps(report, allow_nan=False)
    student, teacher = report["generation"]
    assert (student["role"], teacher["role"]) == ("student", "teacher")
    figures = tested.trainer.callback_metrics
    for section, prefix in ((student, ""), (teacher, "teacher_")):
        assert section["scores"]["rouge_l"]["n"] == 2
        assert section["scores"]["rouge_l"]["mean"] == pytest.approx(float(figures[f"test/{prefix}rouge_l"]))
        assert sum(bucket["count"] for bucket in section["buckets"]) == 9
        for bucket in section["buckets"]:
            tag = bucket["label"].replace(" ", "_")
            assert bucket["scores"]["rouge_l"] == pytest.approx(float(figures[f"test/{prefix}rouge_l/{tag}"]))
    assert [bucket["label"] for bucket in student["buckets"]] == ["under 2 words", "2-3 words", "over 3 words"]
    asked = [[(s["id"], s["prompt"], s["reference"]) for s in section["samples"]] for section in (student, teacher)]
    assert asked[0] == asked[1]
    assert len(asked[0]) == 3
    assert student["samples"][0]["response"] != teacher["samples"][0]["response"]


def test_the_table_of_a_test_has_student_and_teacher_side_by_side(tested) -> None:
    events = EventAccumulator(tested.trainer.log_dir)
    events.Reload()
    table = events.Tensors("test/samples/text_summary")[0].tensor_proto.string_val[0].decode().split("\n")
    assert table[0] == "| prompt | response | teacher | reference |"
    assert len(table) == 2 + 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": [1, 2]}, r"^seeds: \[1, 2\] with temperature 0.*or temperature"),
        ({"seeds": []}, r"^seeds: .*\[\]"),
        ({"seeds": [1, 1], "temperature": 1.0}, r"^seeds: expected one or more different .*\[1, 1\]"),
        ({"reference_lengths": [30, 30]}, r"^reference_lengths: .*\[30, 30\]"),
        ({"reference_lengths": [0, 4]}, r"^reference_lengths: .*\[0, 4\]"),
        ({"max_prompts": -3}, r"^max_prompts: .*-3"),
    ],
)
def test_arguments_that_cannot_be_are_refused_with_their_key(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationEvaluator(**given)


def test_lightnings_own_checkpoint_callback_selects_by_rouge_l(pair, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(generation, "rouge_l", lambda *_: {1: 7.0, 2: 9.0, 3: 3.0}[learner.global_step])
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/rouge_l", mode="max", filename="{step}")
    learner = DistillationModule(ModelSpec(str(pair[0])), {"ce": NextToken()})
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        num_sanity_val_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoint, GenerationEvaluator(max_new_tokens=2)],
    )
    trainer.fit(learner, ProceduralData(num_train=24, num_validation=4, num_test=4, batch_size=8))
    assert checkpoint.best_model_score == 9.0
    assert Path(checkpoint.best_model_path).name == "step=2.ckpt"


def test_the_checkpoint_key_selects_by_rouge_l(pair, tmp_path) -> None:
    config = tiny_config(pair, optimizer={"class_path": "SGD", "init_args": {"lr": 0.5}})
    config["model"]["student"]["path"] = str(ASSETS / "student")  # it has been trained, so that ROUGE-L is not 0
    config["trainer"] |= {"val_check_interval": 1, "check_val_every_n_epoch": None, "default_root_dir": str(tmp_path)}
    config |= {
        "checkpoint": {"monitor": "val/rouge_l", "mode": "max", "filename": "best"},
        "generation": {"max_new_tokens": 8},
    }
    cli = run("fit", "--config", write(config, tmp_path / "x.yaml"))
    events = EventAccumulator(cli.trainer.log_dir)
    events.Reload()
    history = {event.step: event.value for event in events.Scalars("val/rouge_l")}
    best = cli.trainer.checkpoint_callback
    assert len(set(history.values())) > 1
    assert float(best.best_model_score) == pytest.approx(max(history.values()))
    step = torch.load(best.best_model_path, weights_only=True)["global_step"]
    assert history[step] == pytest.approx(max(history.values()))


def test_a_resumed_run_keeps_the_turns_of_its_validations() -> None:
    before, after = GenerationEvaluator(every_n_validations=2), GenerationEvaluator(every_n_validations=2)
    before._validations = 5
    after.load_state_dict(before.state_dict())
    assert after._validations == 5
