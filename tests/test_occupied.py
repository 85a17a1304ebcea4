"""In the folder of a run there is one process at a time, and one that was killed keeps nobody out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import run, tiny_config, write
from lightning.pytorch import Callback
from test_moved_runs import content

from lit_distill.files import LOCK_FILE, acquire_lock, release_lock

HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""
TRY = """
import sys
from filelock import FileLock
FileLock(sys.argv[1]).acquire(timeout=0)
"""
FORK = """
import os, sys, time
from pathlib import Path
from lit_distill.files import acquire_lock
assert acquire_lock(Path(sys.argv[1]))
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(600)
"""
STAY = """
import time
from lightning.pytorch import Callback
from lit_distill.cli import main

class Stay(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 3:
            print("held", flush=True)
            time.sleep(600)

if __name__ == "__main__":
    main(["fit", "--config", "c.yaml", "--trainer.callbacks", "[{class_path: stay.Stay}]"])
"""
VERSION = Path("runs/c/version_0")
IN_USE = (
    rf"ckpt_path: another process is running in {VERSION}, and two runs would overwrite each other's files\. Wait until"
)


@pytest.fixture
def config(pair, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for key in [key for key in os.environ if key.startswith(("PL_", "LIT_DISTILL"))]:  # of runs in this process
        monkeypatch.delenv(key)
    settings = tiny_config(pair)
    settings["data"]["init_args"]["num_workers"] = 2
    return write(settings, tmp_path / "c.yaml")


@contextmanager
def another(*words: object) -> Iterator[None]:
    """A process in the folder, which is killed at the end."""
    with subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            assert any(line == "held\n" for line in holder.stdout)
            yield
        finally:
            holder.kill()


def go_on(*arguments: object) -> None:
    run("fit", "--config", "c.yaml", "--ckpt_path", "last", "--trainer.max_steps", "6", *arguments)


@pytest.mark.slow
def test_a_second_run_ends_with_one_line_and_touches_nothing_until_the_first_is_killed(config) -> None:
    (config.parent / "stay.py").write_text(STAY)
    command = [sys.executable, "-m", "lit_distill", "fit", "--config", "c.yaml", "--ckpt_path", "last"]
    with another("stay.py"):
        before = content(VERSION)
        refused = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert content(VERSION) == before
    assert refused.returncode == 1
    assert [line for line in refused.stderr.splitlines() if line.startswith("error: ckpt_path: another process is")]
    assert "Traceback" not in refused.stderr
    run("fit", "--config", "c.yaml", "--ckpt_path", "last")
    assert (VERSION / "export/last/model.safetensors").exists()
    assert not (VERSION / LOCK_FILE).exists()


@pytest.mark.slow
def test_it_is_refused_before_any_weights_load(config, monkeypatch) -> None:
    run("fit", "--config", config)
    before = content(VERSION)
    with another("-c", HOLD, VERSION / LOCK_FILE), monkeypatch.context() as nothing:
        nothing.setattr("lit_distill.module.load_models", lambda *_: pytest.fail("models were loaded"))
        with pytest.raises(ValueError, match=IN_USE):
            go_on()
    (VERSION / LOCK_FILE).unlink()
    assert content(VERSION) == before
    (VERSION / LOCK_FILE).touch()  # as a killed process leaves it
    go_on()
    assert not (VERSION / LOCK_FILE).exists()


@pytest.mark.slow
def test_a_folder_of_checkpoints_that_is_in_use_is_refused_too(config, tmp_path) -> None:
    (tmp_path / "kept").mkdir()
    said = rf"checkpoint\.dirpath: another process is running in {tmp_path}/kept"
    with another("-c", HOLD, tmp_path / "kept" / LOCK_FILE), pytest.raises(ValueError, match=said):
        run("fit", "--config", config, "--checkpoint.dirpath", "kept")


class Look(Callback):
    """Whether the folder is free for others while the run lasts, which may fail."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def on_train_start(self, trainer, pl_module) -> None:
        self.free = is_free(Path(trainer.log_dir))
        if self.fails:
            raise RuntimeError("dead")


def is_free(folder: Path) -> bool:
    """Whether another process could lock the file."""
    done = subprocess.run([sys.executable, "-c", TRY, folder / LOCK_FILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "Timeout" in done.stderr, done.stderr
    return done.returncode == 0


@pytest.mark.slow
def test_a_new_run_has_its_folder_and_gives_it_back_at_its_end_and_when_it_fails(config) -> None:
    looks = [Look(), Look(fails=True)]
    run("fit", "--config", config, trainer_defaults={"callbacks": looks[:1]})
    with pytest.raises(RuntimeError, match="dead"):
        run("fit", "--config", config, trainer_defaults={"callbacks": looks[1:]})
    assert [look.free for look in looks] == [False, False]
    assert is_free(VERSION)
    assert is_free(VERSION.with_name("version_1"))


@pytest.mark.slow
def test_a_process_may_take_its_folder_again_by_any_name(tmp_path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert acquire_lock(tmp_path / "run" / LOCK_FILE)
    assert acquire_lock(tmp_path / "link" / LOCK_FILE)
    assert not is_free(tmp_path / "run")
    release_lock(tmp_path / "link" / LOCK_FILE)
    assert is_free(tmp_path / "run")


@pytest.mark.slow
def test_a_worker_of_a_killed_process_keeps_nobody_out(tmp_path) -> None:
    command = [sys.executable, "-c", FORK, tmp_path / LOCK_FILE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        worker = int(holder.stdout.readline())
        try:
            assert not is_free(tmp_path)
            holder.kill()
            holder.wait()
            os.kill(worker, 0)  # it lives
            assert is_free(tmp_path)
        finally:
            os.kill(worker, signal.SIGKILL)


@pytest.mark.slow
def test_where_nothing_can_be_locked_the_run_says_so_once_and_goes_on(config, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.warns(UserWarning, match=r"version_0/\.running cannot be locked") as said:
        run("fit", "--config", config)
    assert len([warning for warning in said if "cannot be locked" in str(warning.message)]) == 1
    with pytest.warns(UserWarning, match="cannot be locked") as said:
        go_on()
    assert len([warning for warning in said if "cannot be locked" in str(warning.message)]) == 1
