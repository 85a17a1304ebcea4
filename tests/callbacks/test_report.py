"""`lit-distill test` leaves a record and a page, of what was measured, on the first rank alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import yaml
from command_line import run, tiny_config, write

from lit_distill.callbacks import RunReport
from lit_distill.report.record import make_report, read_report, write_report


def reported(pair, **model) -> dict:
    """A tiny config whose tests write a report."""
    return tiny_config(pair, **model) | {"report": {"enabled": True}}


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    """The folder and config of a short training, and the reports of a test before it and of one after it."""
    folder = tmp_path_factory.mktemp("report")
    config = reported(pair, optimizer={"class_path": "SGD", "init_args": {"lr": 0.5}})
    del config["calibration"]  # it is in the report by default
    config["trainer"]["default_root_dir"] = str(folder / "runs")
    config |= {"export": {"enabled": False}, "exposure_bias": {"max_prompts": 2, "num_samples": 1, "max_new_tokens": 3}}
    path = write(config, folder / "tiny.yaml")
    fit = run("fit", "--config", path, "--seed_everything", 7)
    before = run("test", "--config", path)
    checkpoint = fit.trainer.checkpoint_callback.last_model_path
    compare = ("--report.compare_with", json.dumps([before.trainer.log_dir]))
    after = run("test", "--config", path, "--ckpt_path", checkpoint, *compare)
    return fit, before, after


def report_of(cli) -> dict:
    return read_report(Path(cli.trainer.log_dir) / "report.json")


def test_a_test_writes_what_it_has_logged(finished) -> None:
    _, before, after = finished
    for cli in (before, after):
        report = report_of(cli)
        found = cli.trainer.callback_metrics.items()
        logged = {name.removeprefix("test/"): float(value) for name, value in found if name != "step"}
        assert report["metrics"] == pytest.approx(logged, nan_ok=True)
        assert {"perplexity", "rouge_l", "teacher_rouge_l", "ece"} <= set(report["metrics"])
        assert {"calibration", "generation", "exposure_bias"} <= set(report["sections"])
        assert {entry["role"] for entry in report["sections"]["generation"]} == {"student", "teacher"}
        assert report["config"] == yaml.safe_load((Path(cli.trainer.log_dir) / "config.yaml").read_text())
        assert report["run"]["name"] == "tiny"


def test_what_is_logged_of_a_test_stands_at_the_step_of_its_checkpoint(finished) -> None:
    for cli, step in zip(finished[1:], (0, 4), strict=True):
        with (Path(cli.trainer.log_dir) / "metrics.csv").open() as file:
            assert {row["step"] for row in csv.DictReader(file)} == {str(step)}
        assert "step" not in report_of(cli)["metrics"]


def test_a_checkpoint_brings_its_step_its_seed_and_its_curves(finished) -> None:
    fit, before, after = finished
    report = report_of(after)
    assert report["checkpoint"]["step"] == 4
    assert report["run"]["seed"] == 7
    assert report_of(before)["run"]["seed"] == 3
    assert report["curves"]["train/loss"]["steps"] == [1, 2, 3, 4]
    last = float(fit.trainer.callback_metrics["val/perplexity"])
    assert report["curves"]["val/perplexity"]["values"][-1] == pytest.approx(last)
    assert report["training_config"]["seed_everything"] == 7
    assert (report_of(before)["checkpoint"], report_of(before)["curves"]) == (None, {})


def test_the_page_shows_the_student_before_and_after(finished) -> None:
    page = (Path(finished[2].trainer.log_dir) / "report.html").read_text(encoding="utf-8")
    for head in ("student, before training", "student, step 4", "teacher"):
        assert f'<th scope="col">{head}' in page
    assert "Training loss" in page
    assert "config.yaml" in page


def test_the_table_is_printed_once_and_the_page_is_named(pair, tmp_path, monkeypatch, caplog, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        run("test", "--config", write(reported(pair), tmp_path / "x.yaml"), "--trainer.logger", "false")
    assert "same first choice as the teacher" in caplog.text
    assert str(Path("runs") / "report.html") in caplog.text
    assert "Test metric" not in capsys.readouterr().out


def test_nothing_is_written_where_it_is_switched_off_or_nothing_is_tested(pair, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(reported(pair), tmp_path / "x.yaml")
    run("test", "--config", path, "--report.enabled", "false", "--trainer.logger", "false")
    run("validate", "--config", path, "--trainer.logger", "false")
    assert not list(tmp_path.rglob("report.*"))


def test_what_cannot_be_compared_with_is_said_before_anything_is_tested(pair, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(reported(pair), tmp_path / "x.yaml")
    with pytest.raises(ValueError, match=r"report.compare_with: there is no runs/none"):
        run("test", "--config", path, "--report.compare_with", '["runs/none"]')


class Loud(L.Callback):
    def report(self) -> dict:
        return {"mine": [{"a": float("nan")}], "judge": {"ratio": 1.0}}


class Silent(L.Callback):
    report = "no method of ours"


def finish(callback: RunReport, folder: Path, **trainer) -> None:
    """What the callback sees of a Trainer at the end of a test."""
    state = {
        "callbacks": [Loud(), Silent(), Loud(), callback],
        "callback_metrics": {"test/perplexity": 2.0, "test/loss": float("inf")},
        "ckpt_path": None,
        "datamodule": None,
        "is_global_zero": True,
        "log_dir": str(folder),
        "default_root_dir": str(folder),
        "test_loop": SimpleNamespace(verbose=True),
    }
    fake = SimpleNamespace(**state | trainer)
    module = SimpleNamespace(student_spec=SimpleNamespace(path="small"), teacher_config=None, trained_steps=0)
    callback.setup(fake, module, "test")
    callback.on_test_start(fake, module)
    callback.on_test_end(fake, module)


def test_only_the_first_rank_writes(tmp_path) -> None:
    finish(RunReport(), tmp_path, is_global_zero=False)
    assert not list(tmp_path.iterdir())
    finish(RunReport(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html"}


def test_sections_of_several_callbacks_are_gathered_and_of_others_nothing_is_asked(tmp_path) -> None:
    finish(RunReport(), tmp_path)
    report = read_report(tmp_path / "report.json")
    assert report["sections"] == {"mine": [{"a": None}, {"a": None}], "judge": [{"ratio": 1.0}, {"ratio": 1.0}]}
    assert report["metrics"] == {"perplexity": 2.0, "loss": None}


def test_a_test_without_callbacks_and_without_a_folder_passes(tmp_path) -> None:
    finish(RunReport(), tmp_path, callbacks=[], callback_metrics={}, log_dir=None)
    assert not list(tmp_path.iterdir())


def test_a_report_that_is_compared_with_stands_on_the_page(tmp_path) -> None:
    write_report(make_report(tmp_path / "old", {"perplexity": 7.25}, {}, "other"), tmp_path / "old")
    finish(RunReport(compare_with=[str(tmp_path / "old")]), tmp_path / "new")
    assert "7.250" in (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
