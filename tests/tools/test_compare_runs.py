"""Several tests become one table and one page; what is missing is named with the command that makes it."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path

import pytest

from lit_distill.report.record import make_report, write_report

SCRIPT = Path(__file__).parents[2] / "tools" / "compare_runs.py"
VALUES = [3.0, 3.5, 4.75]


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


@pytest.fixture
def runs(tmp_path) -> Path:
    """Three trainings of one configuration with three seeds, each with the folder of its test beside it."""
    for seed, value in enumerate(VALUES):
        training = tmp_path / "kd" / f"version_{seed}"
        training.mkdir(parents=True)
        (training / "config.yaml").write_text(json.dumps({"seed_everything": seed, "model": {"lr": 0.1}}))
        (training / "metrics.csv").write_text("step,train/loss\n1,2.0\n2,1.0\n")
        folder = tmp_path / "kd" / f"version_{seed + 3}"
        checkpoint = training / "checkpoints" / "last.ckpt"
        write_report(make_report(folder, {"perplexity": value}, {}, "small", checkpoint=checkpoint, step=9), folder)
    return tmp_path / "kd"


def test_seeds_become_mean_and_standard_deviation(compare, runs, tmp_path, capsys) -> None:
    compare(runs, "--out", tmp_path / "page.html")
    expected = f"{statistics.mean(VALUES):.3f} ± {statistics.stdev(VALUES):.3f}"
    assert expected in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert expected in page
    assert "seeds 0, 1, 2" in page


def test_a_run_is_a_folder_a_file_or_a_training_and_counts_once(compare, runs, tmp_path, capsys) -> None:
    out = ("--out", tmp_path / "page.html")
    compare(runs / "version_4", runs / "version_4" / "report.json", runs / "version_1", *out)  # 4 tests what 1 trained
    printed = capsys.readouterr().out
    assert "3.500" in printed
    assert "±" not in printed


def test_a_training_without_a_test_names_the_command(compare, runs, tmp_path, capsys) -> None:
    last = runs / "version_0" / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    (runs / "version_3" / "report.json").unlink()
    with pytest.raises(SystemExit, match="2"):
        compare(runs / "version_0", "--out", tmp_path / "page.html")
    said = " ".join(capsys.readouterr().err.split())
    assert f"lit-distill test --config {runs / 'version_0' / 'config.yaml'} --ckpt_path {last}" in said
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("content", ["", "{}", '{"format": "lit-distill report", "version": 0}'])
def test_a_file_that_is_no_report_is_named(compare, tmp_path, capsys, content) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        compare(path)
    assert str(path) in capsys.readouterr().err


def test_a_place_that_is_not_there_is_named(compare, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare(tmp_path / "none")
    assert f"there is no {tmp_path / 'none'}" in capsys.readouterr().err


def test_the_record_is_not_written_over(compare, runs, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare(runs, "--out", runs / "version_3" / "report.json")
    assert "--out" in capsys.readouterr().err
