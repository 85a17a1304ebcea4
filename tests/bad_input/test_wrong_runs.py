"""Checkpoints that are none, folders that cannot be written, and runs that would not do what they are told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from bad_input.conftest import changed
from command_line import run, tiny_config, write
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def checkpoint(pair, tmp_path_factory) -> Path:
    """Of a run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(pair)
    config["trainer"] |= {"max_steps": 2, "default_root_dir": str(folder / "runs")}
    config["generation"] = {"max_prompts": 0}
    run("fit", "--config", write(config, folder / "c.yaml"), "--export.enabled", "false")
    return next(folder.glob("runs/c/version_0/checkpoints/last.ckpt"))


class Attack:
    """What a pickle can do when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("word", [None, "best"])
def test_a_malicious_checkpoint_is_refused_and_its_code_does_not_run(refusal, tmp_path, command, word) -> None:
    ran = tmp_path / "ran"
    folder = tmp_path / "runs" / "wrong" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"state_dict": Attack(ran)}, folder / "last.ckpt")
    message = refusal({}, "--ckpt_path", word or str(folder / "last.ckpt"), command=command)
    assert re.search(r"ckpt_path: .*last\.ckpt cannot be read as a checkpoint of plain tensors", message), message
    assert not ran.exists()
    torch.load(folder / "last.ckpt", weights_only=False)
    assert ran.exists()  # the attack is a real one


def test_lightning_is_told_to_load_weights_only(checkpoint, pair, tmp_path, monkeypatch) -> None:
    asked = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: asked.append(k.get("weights_only")) or load(*a, **k))
    monkeypatch.chdir(tmp_path)
    config = write(changed(tiny_config(pair), {"generation.max_prompts": 0}), tmp_path / "c.yaml")
    run("validate", "--config", config, "--ckpt_path", checkpoint)
    assert asked
    assert all(asked)


def a_part_of_a_checkpoint(path: Path) -> None:
    path.mkdir()
    said = {"state_dict": {}, "student": {}, "global_step": 1, "generation": 0, "ranks": 2}
    torch.save(said, path / "meta.pt")
    save_file({}, path / "0-rank-00000.safetensors")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, r"ckpt_path: there is no x\.ckpt\. Give a \.ckpt file"),
        (lambda path: path.mkdir(), r"ckpt_path: x\.ckpt is a folder but not a checkpoint: it has no meta\.pt"),
        (
            a_part_of_a_checkpoint,
            r"ckpt_path: x\.ckpt is incomplete: 2 ranks wrote it, but only 1 of their files exist",
        ),
        (lambda path: path.write_text("no checkpoint"), r"ckpt_path: x\.ckpt cannot be read as a checkpoint"),
        (lambda path: path.write_bytes(b""), r"ckpt_path: x\.ckpt cannot be read as a checkpoint"),
        (
            lambda path: torch.save({"epoch": 3}, path),
            r"ckpt_path: x\.ckpt is not a checkpoint of lit-distill.*model\.student\.path",
        ),
        (lambda path: torch.save([1, 2], path), r"ckpt_path: x\.ckpt is not a checkpoint of lit-distill"),
    ],
)
def test_what_is_no_checkpoint_is_refused(refusal, tmp_path, make, words: str) -> None:
    make(tmp_path / "x.ckpt")
    message = refusal({}, "--ckpt_path", "x.ckpt")
    assert re.search(words, message), message


def test_a_checkpoint_that_is_cut_off_is_refused(refusal, checkpoint, tmp_path) -> None:
    (tmp_path / "x.ckpt").write_bytes(checkpoint.read_bytes()[:-2000])
    assert "ckpt_path: x.ckpt cannot be read" in refusal({}, "--ckpt_path", "x.ckpt")


def test_a_checkpoint_of_another_model_is_refused(refusal, checkpoint, pair) -> None:
    message = refusal({"model.student.path": str(pair[1])}, "--ckpt_path", str(checkpoint), loading=True)
    assert re.search(
        r"model\.student\.path: \S+ is another model than the checkpoint's student, .* export/last", message
    )


def test_asking_for_pickles_is_refused(refusal, checkpoint) -> None:
    assert "weights_only: false lets a checkpoint run any code" in refusal(
        {}, "--ckpt_path", str(checkpoint), "--weights_only", "false"
    )


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("fit", {"trainer.default_root_dir": "file/runs"}, r"trainer\.default_root_dir: .*file/runs cannot be written"),
        ("fit", {"trainer.default_root_dir": "file"}, r"trainer\.default_root_dir: .*file cannot be written"),
        ("test", {"trainer.default_root_dir": "/proc/nowhere"}, r"/proc/nowhere"),
        ("predict", {"model.prediction": {"path": "file/x.jsonl"}}, r"model\.prediction\.path: .*cannot be written"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named(refusal, tmp_path, command, changes, words: str) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(changes, command=command)
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"id": "a", "model": "teacher"}\n', r"model\.prediction\.path: .*contains responses of the teacher"),
        ("no JSON\n", r"model\.prediction\.path: out\.jsonl, line 1 .*another path"),
        ("no JSON\nat all", r"model\.prediction\.path: out\.jsonl, line 1 .*another path"),
        ('{"id": "a", "mine": "x"}', r"model\.prediction\.path: out\.jsonl, line 1 .*another path"),
        ('{"response": "x"}\n', r"model\.prediction\.path: out\.jsonl, line 1 .*another path"),
    ],
)
def test_predictions_are_not_added_to_another_file(refusal, tmp_path, content: str, words: str) -> None:
    (tmp_path / "out.jsonl").write_text(content)
    message = refusal({"model.prediction": {"path": "out.jsonl"}}, command="predict")
    assert re.search(words, message), message
    assert (tmp_path / "out.jsonl").read_text() == content


def test_a_figure_that_is_a_slip_of_the_pen_is_refused_before_the_first_step(refusal) -> None:
    own = {
        "trainer.callbacks": [{"class_path": "LambdaCallback"}]
    }  # may log anything, so that nobody knows at the start
    message = refusal({"checkpoint.monitor": "val/los", **own}, loading=True)
    assert "checkpoint.monitor: val/los is not logged. Did you mean val/loss?" in message


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_split_that_stands_in_for_another_is_named(pair, tmp_path, monkeypatch, caplog, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"instruction": "Say it.", "output": "It."}\n' * 4)
    split = {"test": "validation", "predict": "train"}[command]
    data = {"class_path": "InstructionData", "init_args": {split: {"path": "data.jsonl"}}}
    config = changed(tiny_config(pair), {"data": data, "model.prediction": {"max_new_tokens": 2}})
    with caplog.at_level("INFO"):
        run(command, "--config", write(config, tmp_path / "c.yaml"))
    expected = f"{command}: no records are given, using the {split} split."
    assert expected in caplog.text


def test_checkpoints_are_written_where_validation_comes_after_every_batch(pair, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config(pair)
    config["trainer"] |= {"max_steps": 3, "val_check_interval": 1}
    config["generation"] = {"max_prompts": 0}
    cli = run("fit", "--config", write(config, tmp_path / "c.yaml"), "--checkpoint.save_top_k", "-1")
    saved = {file.name for file in Path(cli.trainer.log_dir).glob("checkpoints/step-*.ckpt")}
    assert saved == {"step-1.ckpt", "step-2.ckpt", "step-3.ckpt"}
