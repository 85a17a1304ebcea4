"""Whatever a callback raises while fitting, the run's last state is saved, the error is reported, and `last` goes on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from processes import run_on_ranks
from training import learner_of, quiet_trainer, weights

from lit_distill.callbacks import RunCheckpoint
from lit_distill.cli import main
from lit_distill.data import ProceduralData
from lit_distill.distributed.stored import META
from lit_distill.objectives import ForwardKL, PolicyGradient, ReverseKL
from lit_distill.optim import DivergedError
from lit_distill.sources import TeacherMixedRollouts

ON_RANKS = """
import sys, time
from pathlib import Path
from lightning.pytorch import Callback
from lit_distill.callbacks import RunCheckpoint
from lit_distill.data import ProceduralData
from lit_distill.objectives import ForwardKL
from lit_distill.cli import main
sys.path.insert(0, sys.argv[1])
from processes import run_on_ranks
from training import learner_of, quiet_trainer

_, _, student, teacher, strategy, who = sys.argv

class Fail(Callback):
    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step == 5 and trainer.global_rank in map(int, who):
            raise KeyError("ill")

callbacks = [Fail(), RunCheckpoint("saved", save_last=True, every_n_train_steps=3)]
settings = dict(devices=2, strategy=strategy, enable_checkpointing=True, callbacks=callbacks)
begin = time.monotonic()
try:
    quiet_trainer("runs", 8, **settings).fit(
        learner_of((student, teacher), {"kd": ForwardKL()}),
        ProceduralData(num_train=24, num_validation=4, num_test=2, batch_size=4),
    )
except (KeyError, RuntimeError) as error:
    Path(f"{type(error).__name__}-{time.monotonic() - begin:.0f}").touch()
"""
STEPS = 8
COMPLETE = {  # hook -> at which batch it raises, and how many steps are then complete; every batch is one step
    "on_train_batch_end": (5, 5),
    "on_loss_terms": (5, 5),
    "on_validation_start": (6, 6),
    "on_validation_batch_end": (6, 6),
    "on_validation_epoch_end": (6, 6),
    "on_validation_end": (6, 6),
    "on_train_epoch_end": (6, 6),
    "on_train_epoch_start": (6, 6),
    "on_train_end": (8, 8),
}
AGAIN = {  # nothing of the batch was learnt, and it comes again
    "on_train_batch_start": (5, 5),
    "on_before_optimizer_step": (5, 5),
}


class MineError(Exception):
    pass


def failing(hook: str, at: int, error: BaseException) -> Callback:
    """A callback of which one hook raises ``error`` once ``at`` steps are done."""

    def fail(self, trainer, *arguments: Any, **named: Any) -> None:
        if trainer.global_step == at and not trainer.sanity_checking:
            raise error

    return type("Failing", (Callback,), {hook: fail})()


def fit(pair, folder: Path, *callbacks: Callback, source=None, objectives=None, again: bool = False, **settings: Any):
    """Six batches an epoch, a validation after every third."""
    checkpoint = RunCheckpoint(folder, save_last=True)
    quiet = {"limit_val_batches": 1.0, "val_check_interval": 3, "enable_checkpointing": True, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(folder, **{"max_steps": STEPS, **quiet, **settings}, callbacks=[*callbacks, checkpoint])
    data = ProceduralData(num_train=24, num_validation=4, num_test=2, batch_size=4, eval_batch_size=2)
    learner = learner_of(pair, objectives or {"kd": ForwardKL()}, source, lr_scheduler=cosine)
    trainer.fit(learner, data, ckpt_path=str(folder / "last.ckpt") if again else None, weights_only=True)
    return learner


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


@pytest.fixture(scope="module")
def straight(pair, tmp_path_factory):
    """The weights of a run that no error ended."""
    return weights(fit(pair, tmp_path_factory.mktemp("straight")))


@pytest.mark.slow
@pytest.mark.parametrize("hook", COMPLETE)
def test_after_a_batch_the_state_is_saved_and_goes_on_to_the_same_bits(pair, tmp_path, straight, hook: str) -> None:
    at, step = COMPLETE[hook]
    with pytest.raises(MineError, match="ill"):
        fit(pair, tmp_path, failing(hook, at, MineError("ill")))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == step
    assert torch.equal(weights(fit(pair, tmp_path, again=True)), straight)


@pytest.mark.parametrize("hook", AGAIN)
def test_before_the_first_step_of_a_batch_the_state_is_saved_and_goes_on(pair, tmp_path, hook: str) -> None:
    at, step = AGAIN[hook]
    with pytest.raises(MineError, match="ill"):
        fit(pair, tmp_path, failing(hook, at, MineError("ill")))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == step
    assert fit(pair, tmp_path, again=True).global_step == STEPS


def test_in_the_middle_of_a_batch_the_checkpoint_before_it_stays(pair, tmp_path) -> None:
    """Three steps a batch, of which the second is under way."""
    method = {"objectives": {"long": PolicyGradient(), "single": ReverseKL()}}
    method["source"] = TeacherMixedRollouts(max_new_tokens=2, mini_batch_size=4, inner_epochs=3)
    with pytest.raises(MineError, match="ill"):
        fit(pair, tmp_path, failing("on_before_optimizer_step", 7, MineError("ill")), **method, val_check_interval=1)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6


@pytest.mark.parametrize("hook", ["on_rollouts", "on_loss_terms"])
def test_an_error_in_a_phase_leaves_a_whole_number_of_phases(pair, tmp_path, hook: str) -> None:
    method = {"objectives": {"long": PolicyGradient(), "single": ReverseKL()}}
    method["source"] = TeacherMixedRollouts(max_new_tokens=2, mini_batch_size=4, inner_epochs=3)
    at = {"on_rollouts": 3, "on_loss_terms": 4}[hook]
    with pytest.raises(MineError, match="ill"):
        fit(pair, tmp_path, failing(hook, at, MineError("ill")), **method, val_check_interval=6)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
    assert saved == {"on_rollouts": 3, "on_loss_terms": 6}[hook]
    assert fit(pair, tmp_path, again=True, **method, val_check_interval=6).global_step == STEPS


@pytest.mark.parametrize(
    "error",
    [
        DivergedError("NaN"),
        OSError(28, "No space left on device"),
        RuntimeError("Connection closed by peer"),
        KeyboardInterrupt(),
    ],
    ids=["diverged", "disk", "rank", "keyboard"],
)
def test_what_is_not_worth_saving_is_not_saved(pair, tmp_path, error: BaseException) -> None:
    with pytest.raises((type(error), SystemExit)):
        fit(pair, tmp_path, failing("on_train_batch_end", 5, error))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3  # of the validation


def test_before_anything_is_learnt_nothing_is_saved(pair, tmp_path) -> None:
    with pytest.raises(MineError):
        fit(pair, tmp_path, failing("on_train_start", 0, MineError("ill")))
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_state_that_cannot_be_saved_does_not_hide_the_error(pair, tmp_path, monkeypatch, caplog) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(RunCheckpoint, "_save_last_checkpoint", full)
    with caplog.at_level("INFO"), pytest.raises(MineError, match="ill"):
        fit(pair, tmp_path, failing("on_train_batch_end", 2, MineError("ill")))
    assert "The state at step 2 could not be saved: [Errno 5] Input/output error" in caplog.text


def test_early_stopping_without_its_metric_is_one_message_and_the_run_is_saved(
    pair, tmp_path, monkeypatch, capsys
) -> None:
    from command_line import tiny_config, write

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lit-distill"])
    config = tiny_config(pair)
    own = {"class_path": "LambdaCallback"}  # may log anything, so that nobody knows at the start
    config["trainer"]["callbacks"] = [own, {"class_path": "EarlyStopping", "init_args": {"monitor": "mine/metric"}}]
    config |= {"generation": {"max_prompts": 0}, "checkpoint": {"save_top_k": 0}}
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(write(config, tmp_path / "c.yaml"))])
    assert re.match(r"error: trainer\.callbacks: .*`mine/metric` which is not available", str(stop.value.code))
    assert "Traceback" not in capsys.readouterr().err
    assert torch.load("runs/c/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_another_saver_beside_it_does_not_take_its_place(tmp_path) -> None:
    ours = RunCheckpoint(tmp_path)
    trainer = quiet_trainer(tmp_path, 2, callbacks=[ModelCheckpoint(tmp_path), ours], enable_checkpointing=True)
    trainer.state.fn = TrainerFn.FITTING
    assert trainer.checkpoint_callback is not ours
    assert ours._manages_run(trainer)
    assert not RunCheckpoint(tmp_path)._manages_run(trainer)


def test_a_run_of_one_batch_for_a_trial_writes_no_checkpoint(pair, tmp_path) -> None:
    fit(pair, tmp_path, fast_dev_run=True)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "who", "step"), [("fsdp2", "01", 5), ("ddp", "1", 3)])
def test_several_ranks_save_what_they_have_only_if_all_of_them_met_the_error(
    pair, tmp_path, strategy, who, step
) -> None:
    script = tmp_path / "fail.py"
    script.write_text(ON_RANKS)
    run_on_ranks(script, 2, Path(__file__).parent, *pair, strategy, who)
    last = tmp_path / "saved" / "last.ckpt"
    assert torch.load(last / META if last.is_dir() else last, weights_only=True)["global_step"] == step
    assert list(tmp_path.glob("KeyError-*"))
