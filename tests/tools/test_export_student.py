"""Any checkpoint becomes a Hugging Face folder; nothing else does, and nothing that is there is lost."""

from __future__ import annotations

import importlib.util
import os
import pickle
from pathlib import Path

import pytest
import torch
from command_line import run, tiny_config, write
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "tools" / "export_student.py"
PROMPT = "Sort the words.\nred cat\n"


@pytest.fixture(scope="module")
def export():
    spec = importlib.util.spec_from_file_location("export_student", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(pair)
    config["model"]["student"]["keep_layers"] = 1
    config["trainer"] |= {"default_root_dir": str(folder), "max_steps": 2}
    return run("fit", "--config", write(config, folder / "x.yaml"), "--export.enabled", "false")


@pytest.fixture
def checkpoint(finished) -> str:
    return finished.trainer.checkpoint_callback.last_model_path


def test_a_checkpoint_of_a_pruned_student_becomes_a_model_that_loads(finished, checkpoint, export, tmp_path) -> None:
    export(checkpoint, tmp_path / "new" / "folder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder")
    ids = AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")(PROMPT, return_tensors="pt").input_ids
    assert model.config.num_hidden_layers == 1
    with torch.no_grad():
        expected = finished.model.student.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_the_weights_are_written_in_the_dtype_asked_for(checkpoint, export, tmp_path) -> None:
    export(checkpoint, tmp_path / "x", "--dtype", "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype="auto").dtype == torch.bfloat16


def test_a_folder_with_something_in_it_is_replaced_only_on_request(checkpoint, export, tmp_path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    export(checkpoint, folder)  # empty: nothing to lose
    (folder / "mine.txt").write_text("")
    with pytest.raises(SystemExit, match="already exists"):
        export(checkpoint, folder)
    assert (folder / "mine.txt").exists()
    export(checkpoint, folder, "--overwrite")
    assert not (folder / "mine.txt").exists()


class Attack:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("content", ["text", "pickle", "other", "tensor", "cut"])
def test_what_is_no_checkpoint_is_refused_and_runs_nothing(checkpoint, export, tmp_path, monkeypatch, content) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.ckpt"
    if content == "text":
        path.write_text("weights")
    elif content == "pickle":
        path.write_bytes(pickle.dumps(Attack()))
    elif content == "cut":
        path.write_bytes(Path(checkpoint).read_bytes()[:5000])
    else:
        torch.save({"state_dict": {}} if content == "other" else torch.ones(2), path)
    with pytest.raises(SystemExit, match=r"error: .*x\.ckpt (cannot be read as|is not) a checkpoint"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "pwned").exists()


def test_a_torch_file_that_runs_code_is_refused(export, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"student": Attack()}, tmp_path / "x.ckpt")
    with pytest.raises(SystemExit, match="cannot be read as a checkpoint of plain tensors"):
        export(tmp_path / "x.ckpt", tmp_path / "out")
    assert not (tmp_path / "pwned").exists()


def test_a_missing_file_is_named(export, tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"checkpoint .*none\.ckpt does not exist"):
        export(tmp_path / "none.ckpt", tmp_path / "out")
