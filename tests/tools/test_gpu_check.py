"""The table of `tools/gpu_check.py`: it passes here, and a wrong number in the project is a row that fails."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_distill.generation.cached_decoder import CachedDecoder
from lit_distill.losses import ChunkedTokenLoss
from lit_distill.models import LMHead

CHECKOUT = Path(__file__).parents[2]
TOOLS = CHECKOUT / "tools"


@pytest.fixture
def checks(monkeypatch):
    """A module of the tool by its name."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return lambda name: importlib.import_module(f"gpu_checks.{name}")


@pytest.fixture
def rows_of(checks, tmp_path):
    """The rows of one subject on the processor."""
    machine, table = checks("machine").Machine(torch.device("cpu"), tmp_path), checks("table").Table()

    def run(subject: str) -> list:
        for name, check in checks(subject).checks(machine):
            table.run(name, check)
        return table.rows

    return run


def failed(rows: list) -> set[str]:
    return {row.what for row in rows if row.verdict == "fail"}


@pytest.mark.parametrize("subject", ["head", "rollouts"])
def test_it_passes(rows_of, subject: str) -> None:
    rows = rows_of(subject)
    assert not failed(rows)
    assert sum(row.verdict == "pass" for row in rows) >= 6


def test_a_head_that_is_a_thousandth_too_large_fails(rows_of, monkeypatch) -> None:
    own = LMHead.finish
    monkeypatch.setattr(LMHead, "finish", lambda self, projection: 1.001 * own(self, projection))
    assert "32-true: value against float64 at once, relative" in failed(rows_of("head"))


def test_a_gradient_of_half_of_the_rows_fails(rows_of, monkeypatch) -> None:
    own = ChunkedTokenLoss._chunks
    monkeypatch.setattr(ChunkedTokenLoss, "_chunks", lambda self, rows: own(self, rows // 2))
    assert "32-true: gradient of the head, relative" in failed(rows_of("head"))


def test_recorded_log_probabilities_that_are_of_another_token_fail(rows_of, monkeypatch) -> None:
    own = CachedDecoder.finish

    def shifted(self, length: int) -> None:
        own(self, length)
        self.logprobs += 2e-3

    monkeypatch.setattr(CachedDecoder, "finish", shifted)
    wrong = failed(rows_of("rollouts"))
    assert {f"32-true: {who}: log-probabilities against a re-score, nats" for who in ("student", "teacher")} <= wrong
    assert "32-true: teacher's kept rows: log-probabilities against a re-score, nats" not in wrong


def test_a_check_that_raises_is_a_row_and_the_others_go_on(checks, capsys) -> None:
    module = checks("table")
    table = module.Table()

    def broken():
        yield module.below("before", 1.0, 2.0)
        raise RuntimeError("no such kernel\nand more")

    table.run("first", broken)
    table.run("second", lambda: [module.below("not a number", float("nan"), 1.0), module.measured("speed", 3.0)])
    assert [row.verdict for row in table.rows] == ["pass", "fail", "fail", "measured"]
    assert table.rows[1].note == "RuntimeError: no such kernel"
    assert table.failed
    assert "1 passed, 2 failed" in table.summary(1.0)
    assert "and more" in capsys.readouterr().err


def test_a_checkout_that_is_not_installed_finds_its_callbacks(tmp_path) -> None:
    """Without any other package: only the standard library is there."""
    for name, text in {
        "lit_distill/__init__.py": "",
        "callbacks/__init__.py": "from lit_distill.callbacks.part import found",
        "callbacks/part.py": "found = 7",
        "tools/gpu_checks/project.py": (TOOLS / "gpu_checks" / "project.py").read_text(),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    folder = str(tmp_path / "tools" / "gpu_checks")
    script = f"import sys; sys.path.insert(0, {folder!r}); from project import make_importable; make_importable()"
    script += "; import lit_distill.callbacks; print(lit_distill.callbacks.found)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "7", done.stderr


@pytest.mark.slow
def test_the_whole_table_passes_on_a_processor(tmp_path) -> None:
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "--device", "cpu", "--json", str(tmp_path / "table.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {row["verdict"] for row in rows} <= {"pass", "measured", "skipped"}
    methods = {
        path.stem for path in (CHECKOUT / "configs").glob("*quickstart.yaml") if not path.stem.startswith("chat")
    }
    assert methods <= {row["check"] for row in rows if row["verdict"] == "pass"}
    assert "0 failed" in done.stdout.splitlines()[-1]
