"""A config that ties head and embeddings over files that hold two tensors, as tools that merge models leave it: two they remain."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import ASSETS, tiny_llama
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lit_distill.callbacks.export import export_checkpoint
from lit_distill.callbacks.folders import save_folder
from lit_distill.models import CausalLM, ModelSpec, load_model
from lit_distill.models.record import student_metadata
from lit_distill.models.spec import open_model

IDS = torch.arange(12).view(2, 6) + 1


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def tie_in_config(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))


@pytest.fixture(params=["one file", "two files", "bare names"])
def merged(request, tmp_path: Path) -> tuple[Path, Tensor]:
    """Such a folder, and the logits of its tensors as they are."""
    from safetensors.torch import load_file, save_file

    model = tiny_llama()
    folder = tmp_path / "merged"
    model.save_pretrained(folder, **({"max_shard_size": "8KB"} if request.param == "two files" else {}))
    if request.param == "bare names":
        file = folder / "model.safetensors"
        weights = {name.removeprefix("model."): weight for name, weight in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    tie_in_config(folder)
    return folder, logits(model)


def test_it_is_loaded_as_its_tensors_are_and_its_config_says_so(merged, caplog) -> None:
    folder, expected = merged
    with caplog.at_level("WARNING"):
        model = load_model(ModelSpec(str(folder)), "model.student")
    torch.testing.assert_close(logits(model), expected)
    assert model.config.tie_word_embeddings is False
    assert "model.student.path: " in caplog.text
    assert "lm_head.weight" in caplog.text


def test_shards_are_read_from_both_tensors(merged) -> None:
    folder, _ = merged
    model, names = open_model(ModelSpec(str(folder)), "model.student")
    assert names is not None
    assert {name.rpartition("model.")[2] for name in names.values()} >= {"lm_head.weight", "embed_tokens.weight"}
    assert names["lm_head.weight"] == "lm_head.weight"
    assert names["model.embed_tokens.weight"].endswith("embed_tokens.weight")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False


def test_a_copy_of_the_embeddings_in_the_files_is_no_second_weight(tmp_path, caplog) -> None:
    model = tiny_llama()
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    model.save_pretrained(tmp_path)
    tie_in_config(tmp_path)
    whole = load_model(ModelSpec(str(tmp_path)), "model.student")
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    opened, _ = open_model(ModelSpec(str(tmp_path)), "model.student")
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    assert opened.config.tie_word_embeddings is True
    assert "exported untied" not in caplog.text


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """There is nothing to write."""


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_export_has_both_tensors_whatever_the_config_says(tmp_path, dtype) -> None:
    trained = tiny_llama()
    claimed = copy.deepcopy(trained)
    claimed.config.tie_word_embeddings = True
    folder = save_folder(claimed, dict(trained.state_dict()), Tokenizer(), tmp_path / "x", dtype)
    assert AutoConfig.from_pretrained(folder).tie_word_embeddings is False
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118 - not a dictionary
    expected = trained.to(getattr(torch, dtype or "float32"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto")), logits(expected))


@pytest.mark.parametrize("recorded", [True, False], ids=["an older checkpoint", "a checkpoint"])
def test_the_student_of_a_checkpoint_is_exported_as_it_was_trained(tmp_path, recorded: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "student")
    tiny_llama(vocabulary=len(tokenizer)).save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    tie_in_config(tmp_path / "merged")
    spec = ModelSpec(str(tmp_path / "merged"))
    lm = CausalLM(load_model(spec, "model.student"))
    record = student_metadata(spec, lm)
    record["config"]["tie_word_embeddings"] |= recorded  # which once was copied from the folder
    state = {f"student.{name}": weight + 0.01 for name, weight in lm.state_dict().items()}
    torch.save({"state_dict": state, "student": record}, tmp_path / "x.ckpt")
    folder = export_checkpoint(tmp_path / "x.ckpt", tmp_path / "exported")
    lm.load_state_dict({name.removeprefix("student."): weight for name, weight in state.items()})
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(lm.model))
