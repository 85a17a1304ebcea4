"""The exported folders are the best and the last student, in the dtype asked for, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import run, tiny_config, write
from safetensors.torch import load_file
from tiny import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from lit_distill.callbacks.folders import save_folder


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    """A run that gets worse, so that the best student is not the last."""
    folder = tmp_path_factory.mktemp("fit")
    config = tiny_config(pair, optimizer={"class_path": "SGD", "init_args": {"lr": 3.0, "maximize": True}})
    config["trainer"] |= {"default_root_dir": str(folder)}
    config["export"] = {"dtype": "bfloat16"}
    return run("fit", "--config", write(config, folder / "x.yaml"))


def exported(cli, name: str) -> dict[str, torch.Tensor]:
    folder = Path(cli.trainer.log_dir) / "export" / name
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def test_best_is_the_best_checkpoint_and_last_the_student_as_it_ended(finished) -> None:
    saved = torch.load(finished.trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    for key, value in exported(finished, "best").items():
        assert torch.equal(value, saved[f"student.model.{key}"].bfloat16()), key
    ended = finished.model.student.model.state_dict()
    for key, value in exported(finished, "last").items():
        assert torch.equal(value, ended[key].bfloat16()), key
    best, last = exported(finished, "best"), exported(finished, "last")
    assert any(not torch.equal(best[key], last[key]) for key in best)


def test_the_folder_says_in_which_dtype_it_is(finished) -> None:
    for name in ("best", "last"):
        assert AutoConfig.from_pretrained(Path(finished.trainer.log_dir) / "export" / name).dtype == torch.bfloat16
    assert finished.model.student.model.dtype == torch.float32


class Tokenizer:
    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def save_pretrained(self, folder: Path) -> None:
        if self.broken:
            raise OSError("the disk is full")


def test_tied_weights_are_written_once_and_stay_tied(tmp_path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    folder = save_folder(model, dict(model.state_dict()), Tokenizer(), tmp_path / "x", None)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight)


def test_a_failed_export_leaves_the_earlier_one(tmp_path) -> None:
    model = tiny_llama()
    save_folder(model, dict(model.state_dict()), Tokenizer(), tmp_path / "x", None)
    other = {name: value + 1 for name, value in model.state_dict().items()}
    with pytest.raises(OSError, match="full"):
        save_folder(model, other, Tokenizer(broken=True), tmp_path / "x", None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight)


def test_tied_weights_are_stored_once_and_tied_again(tmp_path, make_tokenizer) -> None:
    from lit_distill.callbacks.folders import save_folder

    model = tiny_llama(tie_word_embeddings=True)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}  # as a checkpoint has them
    folder = save_folder(model, weights, make_tokenizer(), tmp_path / "student", None)
    stored = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in stored
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = torch.arange(6)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
