"""A run that is killed and told to go on from `last` ends like one that never was, to the last bit."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

import pytest
import torch
from command_line import run, tiny_config, write
from lightning.pytorch import Callback, Trainer
from processes import exit_status
from torch import Tensor

from lit_distill.cli.runs import continue_log, run_loggers

KILLER = """
import os, signal
from lightning.pytorch import Callback, Trainer
from lit_distill.cli import main

class Kill(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == {step} and trainer.global_rank in {ranks}:
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    import sys
    main(["fit", "--config", sys.argv[1], "--trainer.callbacks", "[{{class_path: killer.Kill}}]"])
"""
METHODS = {
    "offline": {},
    "minillm": {
        "source": {
            "class_path": "TeacherMixedRollouts",
            "init_args": {"max_new_tokens": 6, "mini_batch_size": 4, "inner_epochs": 1},
        },
        "objectives": {"long": "PolicyGradient", "single": "ReverseKL"},
    },
    "dpkd": {
        "source": {
            "class_path": "ResponsePairs",
            "init_args": {"chosen": "teacher", "max_new_tokens": 6, "mini_batch_size": 4, "inner_epochs": 2},
        },
        "objectives": {"dpkd": "DirectPreference", "ce": "NextToken"},
    },
    "gkd": {
        "source": {"class_path": "StudentRollouts", "init_args": {"on_policy_fraction": 0.5, "max_new_tokens": 6}},
        "objectives": {"jsd": "JensenShannon"},
    },
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of other processes; more add up in another order


def config_of(pair: tuple[Path, Path], method: str, workers: int) -> dict:
    config = tiny_config(pair, **METHODS[method], lr_scheduler={"class_path": "WarmupCosine"})
    config["model"]["optimizer"] = {"class_path": "AdamW", "init_args": {"lr": 0.01}}
    corpus = {"length": 16, "batch_size": 8, "num_documents": 300}
    config["data"]["init_args"] |= {"num_workers": workers, "corpus": corpus}
    config["model"]["corpus_objectives"] = {"lm": "NextToken"}
    config["trainer"] |= {"max_steps": 14, "val_check_interval": 2, "limit_val_batches": 1, "gradient_clip_val": 1.0}
    config["generation"] = {"max_prompts": 0}
    return config


def weights(cli) -> Tensor:
    return torch.cat([p.detach().flatten() for p in cli.model.student.parameters()])


def logged(log_dir: str | Path) -> list[tuple[str, str]]:
    """Step and figure of every loss, in their order, and of every phase of rollouts."""
    with (Path(log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        (row["step"], row[name])
        for name in ("train/loss", "val/loss", "rollout/response_length")
        for row in rows
        if row.get(name)
    ]


class Stop(Callback):
    """Ends a run where `KILLER` does, in this process: what can be cleaned up is, but nothing is saved."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 9:
            raise ConnectionError("the node is gone")


def killed(config: Path, folder: Path) -> None:
    """Run in a process of its own until SIGKILL."""
    script = folder / "killer.py"
    script.write_text(KILLER.format(step=9, ranks=[0]))
    status, output = exit_status(script, config)
    assert status == -signal.SIGKILL, output[-3000:]


def stopped(config: Path, folder: Path) -> None:
    """Run until an error ends it."""
    with pytest.raises(ConnectionError, match="gone"):
        run("fit", "--config", config, trainer_defaults={"callbacks": [Stop()]})


@pytest.mark.parametrize(
    ("method", "workers", "end"),
    [
        ("offline", 0, stopped),
        ("minillm", 0, stopped),
        pytest.param("offline", 2, killed, marks=pytest.mark.slow),
        pytest.param("minillm", 0, killed, marks=pytest.mark.slow),
        pytest.param("dpkd", 0, killed, marks=pytest.mark.slow),
        pytest.param("gkd", 0, killed, marks=pytest.mark.slow),
    ],
)
def test_after_an_end_in_the_middle_of_a_phase_the_run_goes_on_to_the_same_bits(
    pair, tmp_path, method, workers, end
) -> None:
    settings = config_of(pair, method, workers)
    if workers:
        del settings["calibration"]  # every callback as it is by default
    whole = run("fit", "--config", write(settings, tmp_path / "whole.yaml"))
    config = write(settings, tmp_path / "killed.yaml")
    end(config, tmp_path)
    assert not (tmp_path / "runs" / "killed" / "version_0" / "export").exists()
    resumed = run("fit", "--config", config, "--ckpt_path", "last")
    assert torch.equal(weights(resumed), weights(whole))
    assert logged(resumed.trainer.log_dir) == logged(whole.trainer.log_dir)  # one log, from the first step to the last
    log_dir = Path(resumed.trainer.log_dir)
    assert log_dir.name == "version_0"
    assert (log_dir / "export" / "best" / "model.safetensors").exists()
    seen = (resumed.trainer.checkpoint_callback, whole.trainer.checkpoint_callback)
    assert seen[0].best_model_score == seen[1].best_model_score


class KilledError(BaseException):
    """After which a run saves nothing, as after SIGKILL; after an Exception it would."""


class Die(Callback):
    """Ends a run in the second batch of the validation at step 4, in which nothing is saved, as nothing is by SIGKILL."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if trainer.global_step == 4 and batch_idx == 1 and not trainer.sanity_checking:
            raise KilledError


@pytest.mark.parametrize(
    ("every", "epoch", "monitor"),
    [
        pytest.param(2, False, None, marks=pytest.mark.slow),
        (4, False, "val/loss"),
        pytest.param(4, True, "val/loss", marks=pytest.mark.slow),
    ],
)
def test_after_a_kill_in_a_validation_at_whose_step_a_checkpoint_was_due_it_is_made_again(
    pair, tmp_path, every: int, epoch: bool, monitor: str | None
) -> None:
    config = config_of(pair, "offline", 0)
    config["trainer"] |= {"max_steps": 8, "val_check_interval": 4, "limit_val_batches": 2}
    if epoch:
        config["trainer"] |= {"val_check_interval": 1.0, "limit_train_batches": 4}
    config["checkpoint"] = {"every_n_train_steps": every, "save_top_k": -1, "monitor": monitor}
    whole = run("fit", "--config", write(config, tmp_path / "whole.yaml"))
    config = write(config, tmp_path / "killed.yaml")
    with pytest.raises(KilledError):
        run("fit", "--config", config, trainer_defaults={"callbacks": [Die()]})
    resumed = run("fit", "--config", config, "--ckpt_path", "last")
    assert torch.equal(weights(resumed), weights(whole))
    assert logged(resumed.trainer.log_dir) == logged(whole.trainer.log_dir)
    assert resumed.trainer.checkpoint_callback.best_model_score == whole.trainer.checkpoint_callback.best_model_score
    for cli in (resumed, whole):
        kept = {file.name for file in (Path(cli.trainer.log_dir) / "checkpoints").glob("step-*.ckpt")}
        assert kept == {f"step-{step}.ckpt" for step in range(every, 9, every)}


@pytest.mark.slow
def test_last_and_best_are_those_of_the_newest_run_that_has_them(pair, tmp_path) -> None:
    config = config_of(pair, "offline", 0)
    config["trainer"]["max_steps"] = 4
    written = write(config, tmp_path / "run.yaml")
    fresh = run("fit", "--config", written, "--ckpt_path", "last")  # there is none yet
    assert fresh.trainer.global_step == 4
    assert fresh.trainer.ckpt_path is None
    (tmp_path / "runs" / "run" / "version_7").mkdir()  # killed before its first checkpoint
    for word, expected in (
        ("last", fresh.trainer.checkpoint_callback.last_model_path),
        ("best", fresh.trainer.checkpoint_callback.best_model_path),
    ):
        tested = run("test", "--config", written, "--ckpt_path", word)
        assert Path(tested.trainer.ckpt_path).resolve() == Path(expected).resolve()
    further = run("fit", "--config", written, "--ckpt_path", "last", "--trainer.max_steps", "6")
    assert further.trainer.global_step == 6


@pytest.mark.parametrize("word", ["last", "best"])
def test_a_test_of_a_checkpoint_that_is_not_there_is_refused(pair, tmp_path, word: str) -> None:
    config = write(config_of(pair, "offline", 0), tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=f"ckpt_path: there is no `{word}` checkpoint of the run 'none'"):
        run("test", "--config", config, "--ckpt_path", word)


def test_a_log_outlives_kills_while_it_is_continued(pair, tmp_path) -> None:
    config = config_of(pair, "offline", 0)
    config["trainer"]["max_steps"] = 4
    whole = run("fit", "--config", write(config, tmp_path / "run.yaml"))
    before = logged(whole.trainer.log_dir)
    folder = Path(whole.trainer.log_dir)
    (folder / "metrics.csv").rename(folder / ".metrics.csv.kept")  # killed before the log was written again
    (folder / "metrics.csv").write_text("step\n")  # or while it was
    last = folder / "checkpoints" / "last.ckpt"
    loggers = run_loggers(tmp_path / "runs", "run", last)
    continue_log(Trainer(accelerator="cpu", logger=loggers, default_root_dir=tmp_path), last)
    beside = loggers[1]
    assert logged(whole.trainer.log_dir) == before
    assert not (folder / ".metrics.csv.kept").exists()
    beside.log_metrics({"train/loss": 1.0, "new": 2.0}, step=5)
    beside.save()
    assert [row for row in logged(whole.trainer.log_dir) if row[0] == "5"] == [("5", "1.0")]
