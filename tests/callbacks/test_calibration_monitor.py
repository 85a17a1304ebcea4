"""The calibration that a run logs, draws and reports is that of its models, on one rank and on two."""

from __future__ import annotations

import json
import runpy
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from command_line import run, tiny_config, write
from matplotlib.figure import Figure
from processes import run_on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from lit_distill.callbacks import CalibrationMonitor
from lit_distill.evaluation.calibration import CalibrationMetric, collect
from lit_distill.evaluation.verbalizer import Verbalizer, VerbalizerTask

NEXT_TOKEN_FIGURES = {"ece", "adaptive_ece", "brier", "accuracy"}


@pytest.fixture(scope="module")
def mood(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("mood") / "mood.jsonl"
    texts = ("well", "rather bad, I think", "so so", "great", "never again", "fine", "ok")
    path.write_text("".join(json.dumps({"text": t, "label": i % 2}) + "\n" for i, t in enumerate(texts)))
    return {"path": str(path), "template": "Say: {text}\nMood:", "words": [" sad", " glad"], "batch_size": 2}


def monitor(cli) -> CalibrationMonitor:
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, CalibrationMonitor))


def logged(cli, prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in cli.trainer.callback_metrics if name.startswith(prefix)}


@pytest.fixture(scope="module")
def tested(pair, mood, tmp_path_factory):
    folder = tmp_path_factory.mktemp("test")
    config = tiny_config(pair)
    config["trainer"]["default_root_dir"] = str(folder)
    config["calibration"] = {"tasks": {"mood": mood}, "num_bins": 6}
    return run("test", "--config", write(config, folder / "x.yaml"))


def test_next_tokens_of_both_models_are_those_of_their_own_logits(tested) -> None:
    figures = tested.trainer.callback_metrics
    for prefix, lm in (("", tested.model.student), ("teacher_", tested.model.teacher.lm)):
        metric = CalibrationMetric(6)
        for batch in tested.trainer.datamodule.test_dataloader():
            text = batch.sequences
            with torch.no_grad():
                logits = lm.model(input_ids=text.input_ids, attention_mask=text.attention_mask).logits
            mask = text.target_mask[:, 1:]
            collect(metric, logits[:, :-1][mask].softmax(dim=-1), text.input_ids[:, 1:][mask])
        for name, value in metric.compute().metrics.items():
            torch.testing.assert_close(figures[f"test/{prefix}{name}"], value, rtol=1e-4, atol=1e-5)


def test_a_task_is_asked_at_test_of_both_models(tested, mood) -> None:
    task = VerbalizerTask(Verbalizer(**mood), tested.model.tokenizer, 6)
    for prefix, lm in (("", tested.model.student), ("teacher_", tested.model.teacher)):
        for name, value in task.ask(lm, torch.device("cpu")).metrics.items():
            logged = tested.trainer.callback_metrics[f"test/mood/{prefix}{name}"]
            torch.testing.assert_close(logged, value, rtol=1e-4, atol=1e-6)
    both = {*NEXT_TOKEN_FIGURES, "mass"}
    assert {n.split("/")[-1] for n in tested.trainer.callback_metrics if n.startswith("test/mood/")} == both | {
        f"teacher_{name}" for name in both
    }


def test_the_report_has_the_bins_of_every_task_and_speaker(tested) -> None:
    entries = json.loads(json.dumps(monitor(tested).report(), allow_nan=False))["calibration"]
    assert [(entry["name"], entry["role"]) for entry in entries] == [
        ("next token", "student"),
        ("next token", "teacher"),
        ("mood", "student"),
        ("mood", "teacher"),
    ]
    for entry in entries:
        prefix = ("" if entry["name"] == "next token" else "mood/") + ("teacher_" * (entry["role"] == "teacher"))
        assert entry["ece"] == pytest.approx(tested.trainer.callback_metrics[f"test/{prefix}ece"].item())
        assert sum(found["count"] for found in entry["bins"]) == entry["count"] > 0
        gaps = sum(found["count"] * abs(found["accuracy"] - found["confidence"]) for found in entry["bins"])
        assert gaps / entry["count"] == pytest.approx(entry["ece"], abs=1e-6)
        for found in entry["bins"]:
            assert found["low"] <= found["confidence"] <= found["high"]
    assert entries[2]["count"] == 7


def test_reliability_diagrams_are_figures_in_tensorboard(tested) -> None:
    events = EventAccumulator(tested.trainer.log_dir)
    events.Reload()
    assert {"test/reliability", "test/mood/reliability"} <= set(events.Tags()["images"])


@pytest.mark.slow
def test_validations_ask_the_tasks_only_where_told_to(pair, mood, tmp_path) -> None:
    config = tiny_config(pair)
    config["trainer"] |= {"val_check_interval": 1, "default_root_dir": str(tmp_path)}
    config["generation"]["max_prompts"] = 0
    config["calibration"] = {"tasks": {"mood": mood}, "every_n_validations": 2}
    cli = run("fit", "--config", write(config, tmp_path / "x.yaml"))
    events = EventAccumulator(cli.trainer.log_dir)
    events.Reload()
    assert [event.step for event in events.Scalars("val/ece")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("val/mood/ece")] == [1, 3]


def test_by_default_a_fit_does_not_even_read_the_tasks(pair) -> None:
    unread = CalibrationMonitor(tasks={"mood": Verbalizer("nowhere.jsonl", "{text}", [" a", " b"])})
    unread.setup(None, None, "fit")
    with pytest.raises(ValueError, match=r"^path: there is no file"):
        unread.setup(None, SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(pair[0])), "test")


def test_without_a_teacher_the_student_stands_alone(pair, tmp_path) -> None:
    config = tiny_config(pair, teacher=None, objectives={"ce": "NextToken"})
    del config["calibration"]
    cli = run("validate", "--config", write(config, tmp_path / "x.yaml"), "--trainer.logger", "false")
    assert logged(cli, "val/") >= NEXT_TOKEN_FIGURES
    assert not any(name.startswith("teacher_") for name in logged(cli, "val/"))


def test_it_can_be_switched_off(pair, tmp_path) -> None:
    options = ("--trainer.logger", "false", "--calibration.next_token", "false")
    cli = run("validate", "--config", write(tiny_config(pair), tmp_path / "x.yaml"), *options)
    assert not logged(cli, "val/") & NEXT_TOKEN_FIGURES
    assert monitor(cli).report() == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_bins": 1}, r"^num_bins: expected at least 2, got 1"),
        ({"every_n_validations": 0}, r"^every_n_validations: expected at least 1, or null"),
    ],
)
def test_what_is_wrong_in_the_yaml_is_said_by_its_key(settings, said) -> None:
    with pytest.raises(ValueError, match=said):
        CalibrationMonitor(**settings)


def test_the_diagram_has_both_models_their_errors_and_the_diagonal(tested) -> None:
    from lit_distill.callbacks.calibration import reliability_diagram

    figure = Figure()
    results = monitor(tested)._results["mood"]
    reliability_diagram(results, "mood")(figure)
    axes, shares = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    for speaker in ("student", "teacher"):
        assert any(f"{speaker}: ECE {results[speaker].metrics['ece'].item():.3f}" in label for label in labels)
    assert axes.get_ylabel() == "accuracy"
    assert any(np.array_equal(line.get_xydata(), [[0, 0], [1, 1]]) for line in axes.lines)
    assert "7 predictions" in shares.get_xlabel()
    heights = [bar.get_height() for bar in shares.patches]
    assert sum(heights) == pytest.approx(200)  # percent, of two models


SCRIPT = """
import json, sys
import lightning as L
from lit_distill.callbacks import CalibrationMonitor
from lit_distill.data import ProceduralData
from lit_distill.evaluation.verbalizer import Verbalizer
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import ForwardKL

student, teacher, mood, devices, out = sys.argv[1:]
monitor = CalibrationMonitor(tasks={"mood": Verbalizer(**json.loads(mood))})
trainer = L.Trainer(
    accelerator="cpu", devices=int(devices), strategy="ddp" if devices == "2" else "auto", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[monitor],
)
learner = DistillationModule(ModelSpec(student), {"kd": ForwardKL()}, ModelSpec(teacher))
trainer.test(learner, ProceduralData(num_train=8, num_validation=4, num_test=9, eval_batch_size=4), verbose=False)
if trainer.is_global_zero:
    json.dump(monitor.report()["calibration"], open(out, "w"))
"""


@pytest.mark.slow
def test_two_ranks_equal_one_on_an_odd_number_of_items(pair: tuple[Path, Path], mood, tmp_path) -> None:
    script = tmp_path / "calibrate.py"
    script.write_text(SCRIPT)
    outs = [tmp_path / "1.json", tmp_path / "2.json"]
    given = [[str(script), *map(str, pair), json.dumps(mood), out.stem, str(out)] for out in outs]
    with patch.object(sys, "argv", given[0]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(script))
    run_on_ranks(script, 2, *given[1][1:])
    results = [json.loads(out.read_text()) for out in outs]
    assert len(results[0]) == 4
    for one, two in zip(*results, strict=True):
        bins = zip(one.pop("bins"), two.pop("bins"), strict=True)
        assert all(a == pytest.approx(b, rel=1e-5) for a, b in bins)
        for name, value in one.items():
            assert two[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)), name
