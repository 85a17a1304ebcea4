"""Under SLURM, a run whose time is nearly up saves, goes back into the queue once, and goes on to the same bits."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import run, write
from lightning.pytorch import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from test_resume import config_of, logged, weights

JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "kd",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
TASK = """
import os, signal, sys
from lightning.pytorch import Callback
from lit_distill.cli import main

class Tell(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

if __name__ == "__main__":
    main(["fit", *sys.argv[1:]])
"""


class Tell(Callback):
    """Sends SIGUSR1 once, from one of the hooks."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self.tell)

    def tell(self, trainer, *arguments: object) -> None:
        if trainer.global_step == self.step:
            self.step = -1
            os.kill(os.getpid(), signal.SIGUSR1)


def small(pair: tuple[Path, Path]) -> dict:
    """Eight steps with validations of two batches."""
    config = config_of(pair, "offline", 0)
    config["trainer"] |= {"max_steps": 8, "val_check_interval": 4, "limit_val_batches": 2}
    return config


@pytest.fixture(autouse=True)
def _in_a_job(tmp_path, monkeypatch) -> None:
    for key, value in JOB.items():
        monkeypatch.setenv(key, value)
    for key in ("MASTER_ADDR", "MASTER_PORT"):  # Lightning will set them
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def requeued(tmp_path, monkeypatch):
    """What `scontrol` was asked for."""
    asked, tool = tmp_path / "asked", tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nsleep ${{TAKES:-0}}\necho "$@" >> {asked}\necho refused >&2\nexit ${{REFUSE:-0}}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return lambda: asked.read_text().splitlines() if asked.exists() else []


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    """A run that nobody told to stop, outside of SLURM."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        for key in JOB:
            here.delenv(key, raising=False)
        cli = run("fit", "--config", write(small(pair), folder / "c.yaml"))
        assert not isinstance(cli.trainer._accelerator_connector.cluster_environment, SLURMEnvironment)
        return weights(cli), logged(folder / cli.trainer.log_dir), cli.trainer.checkpoint_callback.best_model_score


def told(config: Path, hook: str, step: int, *arguments: str) -> None:
    """Train until SIGUSR1 ends the run; the handlers of signals are those from before then."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(SIGTERMException):
        run("fit", "--config", config, *arguments, trainer_defaults={"callbacks": [Tell(hook, step)]})
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "step", "saved"),
    [
        pytest.param("on_before_optimizer_step", 1, 2, marks=pytest.mark.slow),
        ("on_before_optimizer_step", 3, 4),  # a validation of two batches is due
        pytest.param("on_validation_batch_start", 4, 4, marks=pytest.mark.slow),  # in its first batch
        pytest.param("on_sanity_check_start", 0, 1, marks=pytest.mark.slow),  # as soon as there is something to save
    ],
)
def test_a_job_whose_time_is_nearly_up_goes_back_into_the_queue_once_and_goes_on_to_the_same_bits(
    pair, tmp_path, whole, requeued, hook: str, step: int, saved: int
) -> None:
    config = write(small(pair), tmp_path / "told.yaml")
    told(config, hook, step)
    assert requeued() == ["requeue 4711"]
    assert torch.load("runs/told/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"] == saved
    assert not list(tmp_path.rglob("hpc_ckpt*"))  # Lightning's, which any other run in this folder would go on from
    handler = signal.getsignal(signal.SIGTERM)
    resumed = run("fit", "--config", config, "--ckpt_path", "last")
    assert signal.getsignal(signal.SIGTERM) == handler
    assert isinstance(resumed.trainer._accelerator_connector.cluster_environment, SLURMEnvironment)
    assert torch.equal(weights(resumed), whole[0])
    assert logged(resumed.trainer.log_dir) == whole[1]
    assert resumed.trainer.checkpoint_callback.best_model_score == whole[2]
    assert requeued() == ["requeue 4711"]


def test_a_step_that_was_saved_already_is_no_reason_not_to_requeue(pair, tmp_path, monkeypatch, requeued) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")  # `requeue 4711` may be the whole array
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "11")
    config = write(small(pair), tmp_path / "told.yaml")
    told(config, "on_before_optimizer_step", 1, "--checkpoint.every_n_train_steps=1", "--checkpoint.monitor=null")
    assert requeued() == ["requeue 4700_11"]


@pytest.mark.parametrize("missing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_job_that_slurm_does_not_take_back_says_what_to_do(pair, tmp_path, monkeypatch, requeued, missing) -> None:
    if missing:
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("REFUSE", "1")
    config = write(small(pair), tmp_path / "told.yaml")
    reason = "No such file" if missing else "status 1 refused"
    with pytest.warns(UserWarning, match=rf"scontrol requeue 4711` failed \(.*{reason}.*submitted with --requeue"):
        told(config, "on_before_optimizer_step", 1)
    assert torch.load("runs/told/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_a_validation_leaves_nothing_that_another_run_would_start_from(pair, tmp_path) -> None:
    handlers = []

    class Look(Callback):
        def on_validation_start(self, *arguments: object) -> None:
            handlers.append(signal.getsignal(signal.SIGUSR1))

    config = small(pair)
    del config["trainer"]["max_steps"]
    written = write(config, tmp_path / "c.yaml")
    run("validate", "--config", written, trainer_defaults={"callbacks": [Look()]})
    assert handlers == [signal.SIG_DFL]  # not Lightning's, which saves in the folder of all runs


@pytest.mark.slow
def test_of_two_ranks_that_are_told_both_save_and_one_requeues_before_any_ends(
    pair, tmp_path, monkeypatch, requeued
) -> None:
    monkeypatch.setenv("TAKES", "3")
    (tmp_path / "task.py").write_text(TASK)
    config = write(small(pair), tmp_path / "told.yaml")
    options = ["--config", config, "--trainer.devices=2", "--trainer.strategy=fsdp2"]
    callbacks = ["--trainer.callbacks", "[{class_path: task.Tell}]"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tasks = []
    for rank in ("0", "1"):
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
        environment = {**os.environ, **place, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "task.py", *map(str, options), *callbacks]
        tasks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    end = time.monotonic() + 120
    try:
        while all(task.poll() is None for task in tasks) and time.monotonic() < end:
            time.sleep(0.05)
        before = requeued()
        said = [task.communicate(timeout=120)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [143, 143], said[0][-3000:] + said[1][-3000:]
    assert before == requeued() == ["requeue 4711"]
    assert torch.load("runs/told/version_0/checkpoints/last.ckpt/meta.pt", weights_only=True)["global_step"] == 3
