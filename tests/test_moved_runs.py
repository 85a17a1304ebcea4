"""A run whose folder was moved or copied goes on where it lies now."""

from __future__ import annotations

import csv
import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from command_line import run, tiny_config, write
from lightning.pytorch import Callback

from lit_distill.distributed.checkpoint import save_sharded


class Look(Callback):
    """What the run knows of its checkpoints when it goes on."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.known = trainer.checkpoint_callback.state_dict()


@pytest.fixture
def config(pair, tmp_path, monkeypatch) -> Path:
    """Of a run whose best checkpoint, by a loss that falls, is that of the first validation."""
    monkeypatch.chdir(tmp_path)
    settings = tiny_config(pair) | {"checkpoint": {"mode": "max"}}
    settings["model"]["optimizer"] = {"class_path": "AdamW", "init_args": {"lr": 0.01}}
    return write(settings, tmp_path / "c.yaml")


def content(folder: Path) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def to_folders(checkpoints: Path) -> None:
    """Make a folder of shards of every checkpoint."""
    for path in checkpoints.glob("*.ckpt"):
        state = torch.load(path, weights_only=True)
        path.unlink()
        save_sharded(state, path, 0, lambda: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("move", "sharded"),
    [
        pytest.param(shutil.move, False, id="moved, files", marks=pytest.mark.slow),
        pytest.param(shutil.move, True, id="moved, shards"),
        pytest.param(shutil.copytree, False, id="copied, files"),
        pytest.param(shutil.copytree, True, id="copied, shards", marks=pytest.mark.slow),
    ],
)
def test_its_last_and_its_best_are_those_in_the_new_place(config, tmp_path, move, sharded: bool) -> None:
    before = run("fit", "--config", config).trainer.checkpoint_callback.state_dict()
    assert Path(before["best_model_path"]).name == "step-2.ckpt"
    old, new = Path("runs"), tmp_path / "elsewhere"
    if sharded:
        to_folders(old / "c/version_0/checkpoints")
    was = content(old)
    move(old, new)
    arguments = ("--trainer.default_root_dir", new, "--ckpt_path", "last", "--trainer.max_steps", "8")
    resumed = run("fit", "--config", config, *arguments, trainer_defaults={"callbacks": [look := Look()]})
    checkpoints = new / "c" / "version_0" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-2.ckpt", "last.ckpt"}
    assert look.known["last_model_path"] == str(checkpoints / "last.ckpt")
    for known in (look.known, resumed.trainer.checkpoint_callback.state_dict()):
        assert known["dirpath"] == str(checkpoints)
        assert known["best_model_path"] == known["kth_best_model_path"] == str(checkpoints / "step-2.ckpt")
        assert known["best_k_models"] == {str(checkpoints / "step-2.ckpt"): before["best_model_score"]}
        assert known["best_model_score"] == before["best_model_score"]
    assert (checkpoints.parent / "export" / "best" / "model.safetensors").exists()
    with (checkpoints.parent / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["val/loss"]] == ["2", "4", "6", "8"]
    assert content(old) == (was if move is shutil.copytree else {})


@pytest.mark.slow
def test_files_of_another_run_that_have_the_same_names_are_not_taken_for_its_own(config, tmp_path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    for folder in (ours, other):
        run("fit", "--config", config, "--checkpoint.dirpath", folder)
    was = content(other)
    arguments = ("--checkpoint.dirpath", other, "--ckpt_path", ours / "last.ckpt", "--trainer.max_steps", "6")
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        run("fit", "--config", config, *arguments)
    assert was.items() <= content(other).items()
