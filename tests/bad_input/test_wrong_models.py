"""Models that cannot be read, or do not fit together: refused before training, with the key and what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_input.conftest import damaged, mixed
from safetensors.torch import load_file, save_file


def edit(file: Path, **values: object) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **values}))


def weights_that_are_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def a_weight_short(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def a_shard_short(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-1-of-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickles(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def a_cache(folder: Path) -> None:
    emptied(folder)
    (folder / "cache.json").write_text("{}")


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def its_own_code(folder: Path) -> None:
    edit(
        folder / "config.json",
        model_type="mine",
        architectures=["Mine"],
        auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    )
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")


def tokens_in_another_order(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def another_end(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text())
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    file.write_text(json.dumps({**content, "eos_token": sorted(vocabulary, key=vocabulary.get)[50]}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "not there": (shutil.rmtree, r"model\.(\w+)\.path: .*does not exist"),
    "NaN weights": (weights_that_are_nan, r"model\.(\w+)\.path: .*NaN or infinite weights in model\.norm\.weight"),
    "a missing weight": (a_weight_short, r"model\.(\w+)\.path: .*lacks weights.*up_proj"),
    "a missing shard": (a_shard_short, r"model\.(\w+)\.path: .*lacks 1 of 2 weight files: model-2-of-2"),
    "pickled weights": (pickles, r"model\.(\w+)\.path: .*pytorch_model\.bin: a pickle, which can run any code"),
    "weights cut off": (cut_off, r"model\.(\w+)\.path: .*could not be loaded"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r"model\.(\w+)\.path: .*no model\.safetensors",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"model\.(\w+)\.path: .*no config\.json"),
    "a broken config": (lambda folder: (folder / "config.json").write_text("{"), r"model\.(\w+)\.path: .*config"),
    "an unknown architecture": (
        lambda folder: edit(folder / "config.json", model_type="foo"),
        r"model\.(\w+)\.path: .*foo",
    ),
    "other shapes": (
        lambda folder: edit(folder / "config.json", intermediate_size=40),
        r"model\.(\w+)\.path: .*contradict config\.json",
    ),
    "an encoder": (
        lambda folder: edit(folder / "config.json", model_type="bert"),
        r"model\.(\w+)\.path: .*masked language model",
    ),
    "code of its own": (its_own_code, r"model\.(\w+)\.path: .*trust_remote_code"),
    "nothing in it": (emptied, r"model\.(\w+)\.path: .*no config\.json\. Give a folder"),
    "a teacher cache": (a_cache, r"model\.(\w+)\.path: .*is a teacher cache\. Give it as .*CachedTeacher"),
    "no tokenizer": (
        lambda folder: [file.unlink() for file in folder.glob("*token*")],
        r"model\.(\w+)\.path: .*tokenizer",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_with_its_key(refusal, pair, tmp_path, damage: str, role: str) -> None:
    make, words = DAMAGES[damage]
    folder = damaged(dict(zip(("student", "teacher"), pair, strict=True))[role], tmp_path / "model")
    make(folder)
    message = refusal({f"model.{role}.path": str(folder)}, loading=True)
    found = re.search(words, message, re.DOTALL)
    assert found, message
    assert found[1] == role
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (tokens_in_another_order, r"model\.teacher: its tokenizer differs from the student's: 2 of"),
        (another_end, r"The student's end-of-sequence token.*model\.teacher\.path"),
    ],
)
def test_models_that_do_not_share_their_tokens_are_refused(refusal, pair, tmp_path, damage, words: str) -> None:
    folder = damaged(pair[1], tmp_path / "other")
    damage(folder)
    message = refusal({"model.teacher.path": str(folder)}, loading=True)
    assert re.search(words, message, re.DOTALL), message


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_texts_longer_than_a_model_reads_are_refused_before_loading(refusal, pair, tmp_path, role: str) -> None:
    folder = damaged(dict(zip(("student", "teacher"), pair, strict=True))[role], tmp_path / "short")
    edit(folder / "config.json", max_position_embeddings=8)
    message = refusal({f"model.{role}.path": str(folder)})
    assert re.search(rf"data\.init_args\.max_length: .*context length of model\.{role} is 8\b", message), message


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (
            mixed(max_new_tokens=1000),
            r"model\.source\.init_args\.max_new_tokens: .*response of 1000 .*context length of model\.student is 512",
        ),
        (
            {"generation.max_new_tokens": 1000},
            r"generation\.max_new_tokens: .*response of 1000 .*context length of model\.student is 512",
        ),
        (
            {
                "exposure_bias.max_new_tokens": 1000,
                "exposure_bias.max_prompts": 2,
                "exposure_bias.every_n_validations": 1,
            },
            r"exposure_bias\.max_new_tokens: .* a response of 1000",
        ),
    ],
)
def test_responses_that_would_outgrow_a_model_are_refused_before_loading(refusal, changes, key: str) -> None:
    message = refusal(changes)
    assert re.search(key, message), message


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"keep_layers": 9}, r"model\.student\.keep_layers"),
        ({"keep_layers": [0, 7]}, r"model\.student\.keep_layers"),
        ({"drop_layers": [0, 1]}, r"model\.student\.drop_layers"),
        ({"keep_layers": 1, "drop_layers": [0]}, r"model\.student\.(keep|drop)_layers"),
        ({"attn_implementation": "magic"}, r"model\.student\.\w+: .*magic"),
        ({"gguf_file": "weights.gguf"}, r"model\.student\.path: .*weights\.gguf"),
        ({"tokenizer": "./nowhere"}, r"model\.student\.tokenizer: "),
    ],
)
def test_wrong_keys_of_a_model_are_named(refusal, pair, keys, words: str) -> None:
    message = refusal({"model.student": {"path": str(pair[0]), **keys}}, loading=True)
    assert re.search(words, message, re.DOTALL), message
