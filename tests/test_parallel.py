"""Runs that are spread over two ranks end like those of one process, from any checkpoint of any of them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from processes import run_on_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_distill.distributed import AtomicCheckpointIO, FSDP2Strategy, read_checkpoint
from lit_distill.distributed.checkpoint import save_sharded
from lit_distill.validation import check_strategy

RUNS = """
import sys
from pathlib import Path
import lightning as L, torch
from lit_distill.callbacks import HuggingFaceExport, RunCheckpoint
from lit_distill.data import ProceduralData
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import PolicyGradient, ReverseKL
from lit_distill.distributed import FSDP2Strategy, gathered
from lit_distill.sources import TeacherMixedRollouts

EXPORTED = ("one", "two", "two whole", "together", "together whole")
student, teacher, devices, folder, *plans = sys.argv[1:]
folder = Path(folder)
for plan in plans:
    name, strategy, kind, start, precision, dtype = plan.split(",")
    L.seed_everything(1)
    if strategy != "auto":
        together = 2 if strategy == "together" else 1
        strategy = FSDP2Strategy(tensor_parallel_size=together, save_distributed_checkpoint=kind == "folder")
    learner = DistillationModule(
        ModelSpec(student, dtype=dtype or None), {"long": PolicyGradient(), "single": ReverseKL()}, ModelSpec(teacher),
        TeacherMixedRollouts(alpha=0.3, max_new_tokens=5, mini_batch_size=4, inner_epochs=1, shuffle=False),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3), micro_batch_size=3,
    )
    checkpoint = RunCheckpoint(folder / name, filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
    trainer = L.Trainer(
        default_root_dir=folder / name, accelerator="cpu", devices=int(devices), strategy=strategy, max_steps=6, logger=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, precision=precision,
        callbacks=[checkpoint, *([HuggingFaceExport()] if name in EXPORTED else [])],
    )
    trainer.fit(learner, ProceduralData(num_train=32, num_validation=4, num_test=4, batch_size=8), ckpt_path=start or None)
    weights = gathered(dict(learner.student.named_parameters()), keep=True)
    if trainer.is_global_zero:
        whole = torch.cat([w.detach().flatten().float() for w in weights.values()])
        torch.save({"weights": whole, "loss": float(trainer.callback_metrics["train/loss"])}, folder / f"{name}.pt")
"""


@pytest.fixture(scope="module")
def runs(pair, tmp_path_factory) -> Path:
    """Runs of six steps, and others that go on from their second step on other numbers of ranks, with or without shards."""
    folder = tmp_path_factory.mktemp("runs")
    script = folder / "fit.py"
    script.write_text(RUNS)
    half = "step=2.ckpt"

    def plan(
        name: str, strategy: str, kind: str = "", start: object = "", precision: str = "32-true", dtype: str = ""
    ) -> str:
        return ",".join([name, strategy, kind, str(start), precision, dtype])

    run_on_ranks(script, 1, *pair, 1, folder, plan("one", "auto"))
    two = [
        plan("two", "fsdp2", "folder"),
        plan("two whole", "fsdp2", "file"),
        plan("two again", "fsdp2", "folder", folder / "two" / half),
        plan("two from file", "fsdp2", "folder", folder / "two whole" / half),
        plan("two from one", "fsdp2", "file", folder / "one" / half),
        plan("together", "together", "folder"),
        plan("together whole", "together", "file"),
        plan("together again", "together", "folder", folder / "together" / half),
        plan("together from shards", "together", "folder", folder / "two" / half),
        plan("two from together", "fsdp2", "folder", folder / "together" / half),
        plan("mixed", "fsdp2", "folder", precision="bf16-mixed"),
        plan("mixed together", "together", "folder", precision="bf16-mixed"),
        plan("half", "fsdp2", "folder", dtype="bfloat16"),
    ]
    run_on_ranks(script, 2, *pair, 2, folder, *two)
    one = [
        plan("one from folder", "auto", "", folder / "two" / half),
        plan("one from file", "auto", "", folder / "two whole" / half),
        plan("one of shards from folder", "fsdp2", "folder", folder / "two" / half),
        plan("one from together", "auto", "", folder / "together" / half),
    ]
    run_on_ranks(script, 1, *pair, 1, folder, *one)
    return folder


def result(runs: Path, name: str) -> dict:
    return torch.load(runs / f"{name}.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "whole"), [("two again", "two"), ("two from file", "two"), ("together again", "together")]
)
def test_two_ranks_go_on_exactly_as_if_they_had_never_stopped(runs, name, whole) -> None:
    assert torch.equal(result(runs, name)["weights"], result(runs, whole)["weights"])
    assert result(runs, name)["loss"] == result(runs, whole)["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "two", "two from one", "one from folder", "one from file", "one of shards from folder", "together",
        "together whole", "together from shards", "two from together", "one from together",
    ],
)  # fmt: skip
def test_a_run_goes_on_from_the_checkpoint_of_another_number_of_ranks(runs, name) -> None:
    torch.testing.assert_close(result(runs, name)["weights"], result(runs, "one")["weights"], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "mixed together", "half"])
def test_lower_precision_stays_near_full_precision(runs, name) -> None:
    difference = (result(runs, name)["weights"] - result(runs, "one")["weights"]).abs()
    assert 0 < difference.mean() < 0.02  # the weights have moved by up to 0.06


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "together"])
def test_a_checkpoint_of_shards_has_everything_but_the_teacher_once(runs, name) -> None:
    one, two = (read_checkpoint(runs / folder / "last.ckpt") for folder in ("one", name))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert not any("teacher" in key for key in two["state_dict"])
    for key, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], weight, rtol=0, atol=2e-5)
    ours, theirs = (content["optimizer_states"][0]["state"] for content in (one, two))
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(theirs[0]["exp_avg"], ours[0]["exp_avg"], rtol=0, atol=1e-5)
    assert not list((runs / name).glob(".*"))
    files = (runs / name / "last.ckpt").glob("*.safetensors")
    written = sum(tensor.numel() for file in files for tensor in load_file(file).values())
    states = [value for state in theirs.values() for value in state.values() if value.ndim]
    assert written == sum(tensor.numel() for tensor in [*two["state_dict"].values(), *states])


def without(file: Path) -> None:
    file.unlink()


def cut_short(file: Path) -> None:
    os.truncate(file, 3000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "said"),
    [(without, "last.ckpt is incomplete: 2 ranks wrote it, but only 1 of their files exist"),
     (cut_short, "rank-00001.safetensors cannot be read: .*Give another checkpoint")],
)  # fmt: skip
def test_a_checkpoint_of_which_a_part_is_lost_is_refused(runs, tmp_path, damage, said: str) -> None:
    copy = tmp_path / "last.ckpt"
    shutil.copytree(runs / "two" / "last.ckpt", copy)
    damage(next(copy.glob("*-rank-00001.safetensors")))
    with pytest.raises(ValueError, match=said):
        read_checkpoint(copy)


@pytest.mark.slow
def test_a_checkpoint_of_which_a_piece_is_lost_is_refused(runs, tmp_path) -> None:
    copy = tmp_path / "last.ckpt"
    shutil.copytree(runs / "two" / "last.ckpt", copy)
    file = next(copy.glob("*-rank-00001.safetensors"))
    with safe_open(file, framework="pt") as opened:
        index = json.loads(opened.metadata()["index"])[1:]
    save_file(load_file(file), file, metadata={"index": json.dumps(index)})
    with pytest.raises(ValueError, match=r"last\.ckpt is incomplete: parts of state_dict\."):
        read_checkpoint(copy)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "two whole", "together", "together whole", "one"])
def test_any_checkpoint_and_the_run_itself_become_the_same_folder(runs, name) -> None:
    path = Path(__file__).parents[1] / "tools" / "export_student.py"
    spec = importlib.util.spec_from_file_location("export_student", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main([str(runs / name / "last.ckpt"), str(runs / name / "tool")])
    by_tool = AutoModelForCausalLM.from_pretrained(runs / name / "tool").state_dict()
    by_run = AutoModelForCausalLM.from_pretrained(runs / name / "export" / "last").state_dict()
    stored = read_checkpoint(runs / name / "last.ckpt")["state_dict"]
    for key, weight in by_tool.items():
        assert torch.equal(weight, by_run[key])
        assert torch.equal(weight, stored[f"student.model.{key}"])


def test_a_save_that_fails_leaves_the_last_good_checkpoint(tmp_path) -> None:
    store, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    store.save_checkpoint({"weights": torch.ones(3)}, path)
    with pytest.raises(AttributeError):
        store.save_checkpoint({"weights": torch.zeros(3), "broken": lambda: None}, path)
    assert torch.equal(store.load_checkpoint(path)["weights"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("free", [100, 10**9])
def test_a_write_that_fails_on_a_full_disk_says_so_whatever_the_library_says(tmp_path, monkeypatch, free: int) -> None:
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: usage)
    failed = patch("torch.save", side_effect=RuntimeError("unexpected pos 547072 vs 546964"))
    expected = (OSError, "No space left on device: .*last.ckpt") if free == 100 else (RuntimeError, "unexpected pos")
    with failed, pytest.raises(expected[0], match=expected[1]):
        AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_written_anew_stays_good_until_the_new_one_is(tmp_path) -> None:
    path = tmp_path / "last.ckpt"
    save_sharded({"step": 1}, path, 0, lambda: None)
    full = patch("torch.save", side_effect=OSError("the disk is full"))
    with full, pytest.raises(OSError, match="full"):
        save_sharded({"step": 2}, path, 0, lambda: None)
    (path / "1-rank-00007.safetensors").write_bytes(b"of a run on more ranks that was cut off")
    assert read_checkpoint(path)["step"] == 1
    save_sharded({"step": 3}, path, 0, lambda: None)
    assert read_checkpoint(path)["step"] == 3
    assert sorted(file.name for file in path.iterdir()) == ["1-rank-00000.safetensors", "meta.pt"]
    AtomicCheckpointIO().save_checkpoint({"step": 4}, path)  # a file in the place of the folder
    assert read_checkpoint(path)["step"] == 4
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path)


def test_other_ways_to_cut_a_model_are_refused_with_what_to_use() -> None:
    class FSDPStrategy:
        pass

    with pytest.raises(ValueError, match=r"trainer\.strategy: FSDPStrategy .* Use fsdp2"):
        check_strategy(SimpleNamespace(strategy=FSDPStrategy()))
    check_strategy(SimpleNamespace(strategy=FSDP2Strategy()))


@pytest.mark.parametrize(("size", "said"), [(0, "expected at least 1, got 0"), (3, "3 does not divide the 2 ranks")])
def test_ranks_that_cannot_be_grouped_are_refused(size: int, said: str) -> None:
    def start() -> None:
        strategy = FSDP2Strategy(tensor_parallel_size=size)
        strategy.parallel_devices = [torch.device("cpu")] * 2
        strategy.setup_environment()

    with pytest.raises(ValueError, match=rf"^tensor_parallel_size: {said}"):
        start()


def test_mixed_precision_casts_shards_and_not_twice() -> None:
    strategy = FSDP2Strategy()
    strategy.precision_plugin = MixedPrecision("bf16-mixed", "cpu")
    assert strategy.compute_dtype == torch.bfloat16
    with strategy.precision_plugin.forward_context():
        assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match=r"trainer\.precision: 16-mixed"):
        strategy.precision_plugin = MixedPrecision("16-mixed", "cpu")
