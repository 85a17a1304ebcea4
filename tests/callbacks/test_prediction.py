"""`predict` leaves one file, to which no two runs write at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run, tiny_config, write
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_distill.module import DistillationModule

HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""
IN_USE = r"model\.prediction\.path: another `predict` is writing to predictions\.jsonl"


@pytest.fixture
def config(pair, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    settings = {"max_new_tokens": 2}
    return write(tiny_config(pair, prediction=settings), tmp_path / "tiny.yaml")


def ids() -> list[str]:
    return [json.loads(line)["id"] for line in Path("predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_predict_leaves_nothing_but_its_file(config) -> None:
    run("predict", "--config", config)
    assert {path.name for path in config.parent.iterdir()} == {"tiny.yaml", "predictions.jsonl"}


def test_a_second_run_stops_before_it_loads_anything_until_the_first_is_killed(config, monkeypatch) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, ".predictions.jsonl.running"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        try:
            holder.stdout.readline()
            with monkeypatch.context() as nothing:
                loads = "lit_distill.module.load_models"
                nothing.setattr(loads, lambda *_: pytest.fail("models were loaded"))
                with pytest.raises(ValueError, match=IN_USE):
                    run("predict", "--config", config)
            assert not Path("predictions.jsonl").exists()
        finally:
            holder.kill()
    run("predict", "--config", config)
    assert len(set(ids())) == len(ids()) == 48
    assert not Path(".predictions.jsonl.running").exists()


def test_a_run_that_failed_gives_the_file_back(config, monkeypatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(DistillationModule, "predict_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("predict", "--config", config)
    run("predict", "--config", config)
    assert len(ids()) == 48


def test_where_files_cannot_be_locked_the_run_says_so_and_goes_on(config, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.warns(UserWarning, match=r"\.predictions\.jsonl\.running cannot be locked \(No locks available"):
        run("predict", "--config", config)
    assert len(ids()) == 48


def test_a_signal_to_stop_ends_the_run_after_the_batch_and_the_next_one_continues(config, monkeypatch) -> None:
    step = DistillationModule.predict_step

    def stopped(module, batch, batch_idx):
        module.trainer._signal_connector.received_sigterm = True
        return step(module, batch, batch_idx)

    with monkeypatch.context() as signalled:
        signalled.setattr(DistillationModule, "predict_step", stopped)
        with pytest.raises(SIGTERMException):
            run("predict", "--config", config)
    first = len(ids())
    assert 0 < first < 48
    run("predict", "--config", config)
    assert len(set(ids())) == len(ids()) == 48
