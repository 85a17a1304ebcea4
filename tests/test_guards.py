"""What a run does when something breaks: a gradient, a rank, the disk, or the machine's patience."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from command_line import main, run, tiny_config, write
from lightning.pytorch import Callback
from processes import exit_status
from torch import Tensor
from training import weights

from lit_distill.callbacks.collapse import CollapseDetector
from lit_distill.optim import NonFiniteGradientGuard

RUN = """
import os, signal, sys
from lightning.pytorch import Callback
from lit_distill.callbacks.collapse import CollapseDetector
from lit_distill.cli import main

class Break(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == {step} and trainer.global_rank == {rank}:
            {what}

if __name__ == "__main__":
    main(["fit", *sys.argv[1:]])
"""
LAST_WORDS = """
import atexit, ctypes
atexit.register(ctypes.PyDLL(None).sleep, 2)  # the last of all: no thread gets the interpreter until it is ending
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from lit_distill.distributed.watchdog import drain_at_exit

rank_one = os.fork()
dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=0 if rank_one else 1, world_size=2)
if rank_one:
    while not Path("ending").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    dist.broadcast(torch.ones(3), src=0)
    os._exit(os.waitpid(rank_one, 0)[1] != 0)
drain_at_exit(3)
dist.broadcast(torch.ones(3), src=0, async_op=True)
Path("ending").touch()
"""
BREAK = ("--trainer.callbacks", "[{class_path: broken.Break}]")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of other processes; more add up in another order
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def config_of(pair: tuple[Path, Path], **trainer) -> dict:
    config = tiny_config(pair)
    config["model"]["optimizer"] = {"class_path": "AdamW", "init_args": {"lr": 0.01}}
    config["trainer"] |= {"max_steps": 6, "val_check_interval": 3, "limit_val_batches": 1, **trainer}
    return {**config, "generation": {"max_prompts": 0}, "export": {"enabled": False}}


class Poison(Callback):
    """A NaN in the gradient of the second step, before it is clipped."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        last = list(pl_module.student.parameters())[-1]
        self.ids = batch.ids if trainer.global_step == 1 else getattr(self, "ids", ())

        def spoil(parameter: Tensor) -> None:
            if trainer.global_step == 1:
                parameter.grad[0] = float("nan")

        self.hook = last.register_post_accumulate_grad_hook(spoil)

    def on_train_batch_end(self, *arguments) -> None:
        self.hook.remove()


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("every", [1, 4])
def test_a_gradient_that_is_no_number_stops_the_run_with_the_items_and_never_reaches_the_weights(
    pair, tmp_path, clip, every: int
) -> None:
    poison = Poison()
    config = config_of(pair, log_every_n_steps=every, gradient_clip_val=clip)
    students = []

    class Keep(Callback):
        def on_exception(self, trainer, pl_module, exception) -> None:
            students.append(torch.cat([p.detach().flatten() for p in pl_module.student.parameters()]))

    with pytest.raises(
        ValueError, match=r"the gradient is not finite at step 2: .*Lower model\.optimizer\.lr"
    ) as error:
        run("fit", "--config", write(config, tmp_path / "c.yaml"), trainer_defaults={"callbacks": [poison, Keep()]})
    assert poison.ids
    assert all(item in str(error.value) for item in poison.ids)
    assert "model.on_nonfinite: skip" in str(error.value)
    assert students[0].isfinite().all()
    for file in Path("runs").glob("c/version_0/checkpoints/*.ckpt"):
        saved = torch.load(file, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in saved.values())


def test_a_skipped_step_is_said_once_counted_and_changes_neither_weights_nor_the_optimizer(pair, tmp_path) -> None:
    class Without(Poison):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            if trainer.global_step == 1:
                self.before = weights(pl_module)
                optimizer.zero_grad()

        def on_train_batch_end(self, trainer, pl_module, *arguments) -> None:
            if trainer.global_step == 2:
                assert torch.equal(weights(pl_module), self.before)

    config = config_of(pair, gradient_clip_val=1.0)
    config["model"]["on_nonfinite"] = "skip"
    written = write(config, tmp_path / "c.yaml")
    with pytest.warns(UserWarning, match="the gradient of step 2 is not finite, so the step was skipped"):
        skipped = run("fit", "--config", written, trainer_defaults={"callbacks": [Poison()]})
    assert skipped.trainer.global_step == 6
    assert skipped.trainer.callback_metrics["train/skipped_steps"] == 1
    callback = Without()
    callback.on_train_batch_start = lambda *arguments: None
    without = run("fit", "--config", written, trainer_defaults={"callbacks": [callback]})
    assert torch.equal(weights(skipped.model), weights(without.model))


def test_a_run_that_skips_for_ever_stops() -> None:
    class Module:
        trainer = type("Trainer", (), {"world_size": 1})

    guard = NonFiniteGradientGuard("skip")
    parameter = torch.nn.Parameter(torch.zeros(2))

    def steps(count: int) -> None:
        for step in range(count):
            parameter.grad = torch.tensor([1.0, torch.inf])
            guard.mask([parameter], step)
        guard.check(Module.trainer)

    with pytest.warns(UserWarning, match="was skipped"):
        steps(5)
    steps(4)
    with pytest.raises(ValueError, match="the last 10 gradients are not finite; now at step 0"):
        steps(1)


def test_gradients_are_looked_at_without_waiting_for_the_device(monkeypatch) -> None:
    guard, parameter = NonFiniteGradientGuard("stop"), torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, torch.nan, 2.0])

    def waits(*arguments: object) -> None:
        raise AssertionError("waited")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, waits)
    guard.mask([parameter], 1)
    monkeypatch.undo()
    assert parameter.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "step"), [("os.killpg(0, signal.SIGTERM)", 2), ("os.kill(os.getpid(), signal.SIGUSR1)", 3)]
)
def test_after_a_signal_the_run_goes_on_from_its_last_step_to_the_same_bits(
    pair, tmp_path, what: str, step: int
) -> None:
    config = config_of(pair)
    config["data"]["init_args"]["num_workers"] = 2 if "killpg" in what else 0  # the signal comes to the workers too
    whole = run("fit", "--config", write(config, tmp_path / "whole.yaml"))
    config = write(config, tmp_path / "told.yaml")
    script = RUN.format(step=step, rank=0, what=what).replace("    main(", "    os.setsid()\n    main(")
    (tmp_path / "broken.py").write_text(script)
    status, output = exit_status(tmp_path / "broken.py", "--config", config, *BREAK)
    assert status == 143, output[-3000:]
    assert "Traceback" not in output
    assert "--ckpt_path last" in output
    saved = torch.load("runs/told/version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == step + 1
    resumed = run("fit", "--config", config, "--ckpt_path", "last")
    assert torch.equal(weights(resumed.model), weights(whole.model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raise RuntimeError('rank one is ill')", "rank one is ill"),
        ("os.kill(os.getpid(), signal.SIGKILL)", ""),
    ],
)
def test_a_rank_that_ends_ends_the_others_and_is_heard(pair, tmp_path, what: str, said: str) -> None:
    (tmp_path / "broken.py").write_text(RUN.format(step=2, rank=1, what=what))
    config = write(config_of(pair, devices=2, strategy="ddp", max_steps=50), tmp_path / "c.yaml")
    with subprocess.Popen(
        [sys.executable, "broken.py", "--config", config, *BREAK],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=120)  # the pipe is open as long as any rank lives
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0, output[-3000:]
    assert said in output
    assert ("rank 0 has lost the connection to another rank" in output) == ("SIGTERM" not in what)
    assert "closed by peer" not in output
    if "SIGTERM" in what:
        assert torch.load("runs/c/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.slow
def test_a_rank_that_ends_while_its_last_words_are_given_back_does_not_abort(tmp_path) -> None:
    (tmp_path / "talk.py").write_text(LAST_WORDS)
    done = subprocess.run([sys.executable, "talk.py"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-1000:]


@pytest.mark.parametrize(
    ("later", "sign"),
    [
        ((1.0, 0.0, 0.0), "responses are almost empty.* length 12.0 -> 1.0 tokens"),
        ((16.0, 1.0, 0.1), "almost no response ends before max_new_tokens.*unfinished 20% -> 100%"),
        ((12.0, 0.2, 0.9), "responses repeat themselves.*repetition 10% -> (63|90)%"),
    ],
)
def test_a_collapse_of_the_rollouts_is_said_once_with_figures(later, sign: str) -> None:
    watch = CollapseDetector()
    said = [watch.check(step, 12.0, 0.2, 0.1) for step in range(8)]
    assert not any(said)
    said = [text for step in range(8, 16) if (text := watch.check(step, *later))]
    assert len(said) == 1
    assert re.search(rf"collapsed at step (8|9|10): {sign}", said[0]), said[0]


def test_short_responses_from_the_start_are_no_collapse() -> None:
    watch = CollapseDetector()
    assert not any(watch.check(step, 1.0, 1.0, 0.0) for step in range(20))


@pytest.mark.slow
def test_a_student_that_says_one_thing_for_ever_is_noticed(pair, tmp_path) -> None:
    """A random student draws from all tokens alike; where it takes the most probable one, it takes the same for ever."""

    class Stutter(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 3:
                pl_module.source.sampling.temperature = 0.0

    config = config_of(pair, max_steps=8, limit_val_batches=0)
    config["model"]["source"] = {"class_path": "StudentRollouts", "init_args": {"max_new_tokens": 12}}
    config["checkpoint"] = {"monitor": None}
    written = write(config, tmp_path / "c.yaml")
    with pytest.warns(UserWarning, match="responses repeat themselves"):
        run("fit", "--config", written, trainer_defaults={"callbacks": [Stutter()]})


def test_a_full_disk_leaves_the_last_checkpoint_and_is_one_message(pair, tmp_path, monkeypatch, capsys) -> None:
    save, saved = torch.save, []

    def full(what: object, path: object, *arguments: object, **named: object) -> None:
        saved.append(path)
        if len(saved) < 3:
            save(what, path, *arguments, **named)
            return
        Path(path).write_bytes(bytes(1000))
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stop:
        main("fit", "--config", write(config_of(pair), tmp_path / "c.yaml"))
    assert str(stop.value.code).startswith("error: No space left on device")
    assert "--ckpt_path last" in str(stop.value.code)
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    left = list(Path("runs/c/version_0/checkpoints").iterdir())
    assert {file.suffix for file in left} == {".ckpt"}
    assert all(torch.load(file, weights_only=True)["global_step"] == 3 for file in left)
    resumed = run("fit", "--config", tmp_path / "c.yaml", "--ckpt_path", "last")
    assert resumed.trainer.global_step == 6
