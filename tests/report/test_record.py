"""A report survives its file, and what is none is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_distill.report.curves import read_curves
from lit_distill.report.page import render_page, text_card
from lit_distill.report.record import find_reports, make_report, read_report, write_report


def test_a_report_comes_back_from_its_file_and_nan_is_null(tmp_path) -> None:
    metrics = {
        "loss": torch.tensor(0.5),
        "bad": float("nan"),
        "worse": torch.tensor(math.inf),
        "many": np.array([1.0, np.nan]),
    }
    report = make_report(tmp_path, metrics, {"mine": [{"x": (1, float("-inf"), Path("a"))}]}, "small")
    path = write_report(report, tmp_path)
    raw = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert raw["metrics"] == {"loss": 0.5, "bad": None, "worse": None, "many": [1.0, None]}
    assert raw["sections"]["mine"] == [{"x": [1, None, "a"]}]
    assert (raw["format"], raw["version"]) == ("lit-distill report", 2)
    assert read_report(path) == report == find_reports(path, "RUN")[0]
    assert not list(tmp_path.glob("*.part"))


def test_a_report_of_version_1_is_read(tmp_path) -> None:
    report = make_report(tmp_path, {"perplexity": 2.0}, {"generation": [{"role": "teacher", "scores": {}}]}, "small")
    (section,) = report["sections"]["generation"]
    old = {**report, "version": 1, "sections": {"generation": [{**section, "speaker": section["role"]}]}}
    old["figures"] = old.pop("metrics")
    del old["sections"]["generation"][0]["role"]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(old))
    assert read_report(path)["metrics"] == {"perplexity": 2.0}
    assert render_page([read_report(path)])


def test_an_empty_report_still_has_a_page() -> None:
    bare = make_report(Path("runs"), {}, {}, "small")
    assert "How to reproduce" in render_page([bare])
    assert text_card([bare]) is not None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not a report"),
        ('{"format": "lit-distill report", "version": 99}', "has version 99"),
        ('{"format": "lit-distill report", "version": 2, "run": {}}', "has no `student`"),
    ],
)
def test_what_is_no_report_is_refused_by_name(tmp_path, change, says) -> None:
    path = tmp_path / "report.json"
    path.write_text(change)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {says}")):
        read_report(path)


def test_curves_skip_holes_cut_lines_and_are_thinned_to_means(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    lines = [
        "step,train/loss,val/loss,other",
        *(f"{step},{step / 1000},,7" for step in range(1, 1001)),
        "5,nan,2.5,",
        "6,0.0",
    ]
    path.write_text("\n".join(lines))
    curves = read_curves(path)
    assert curves["val/loss"] == {"steps": [5.0], "values": [2.5]}
    assert set(curves) == {"train/loss", "val/loss"}
    values = np.array(curves["train/loss"]["values"])
    assert 200 <= len(values) <= 240
    assert np.all(np.diff(values) > 0)
    assert read_curves(tmp_path / "none.csv") == {}
