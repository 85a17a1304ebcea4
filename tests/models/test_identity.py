"""A model is known by its weights: a change of any tensor makes another one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_distill.models import ModelSpec
from lit_distill.models.identity import _content, identity_of, is_same_model, weights_digest


@pytest.fixture
def folder(pair, tmp_path) -> Path:
    return Path(shutil.copytree(pair[0], tmp_path / "model"))


def known(folder: Path) -> tuple[dict, str]:
    _content.cache_clear()
    spec = ModelSpec(str(folder))
    return identity_of(spec, "student"), weights_digest(spec, "student")


def test_a_change_of_any_tensor_makes_another_model(folder: Path) -> None:
    before, digest = known(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    assert len(weights) > 10
    for name, weight in weights.items():
        save_file({**weights, name: weight + 1}, file, metadata={"format": "pt"})
        after, other = known(folder)
        assert not is_same_model(before, after), name
        assert other != digest, name
    save_file(weights, file, metadata={"format": "pt"})
    assert is_same_model(before, known(folder)[0])


def test_a_checkpoint_is_known_by_a_change_of_a_small_part(tmp_path, folder: Path) -> None:
    spec = ModelSpec(str(folder))
    state = {str(index): torch.zeros(40_000) for index in range(50)}  # 160 kB each
    digests = set()
    for index in (None, 0, 23, 49):
        changed = state if index is None else {**state, str(index): torch.ones(40_000)}
        torch.save(changed, tmp_path / "a.ckpt")
        digests.add(weights_digest(spec, "student", tmp_path / "a.ckpt"))
    assert len(digests) == 4


def test_a_copy_is_the_same_and_digests_of_another_scheme_are_not_compared(folder: Path, tmp_path) -> None:
    here, _ = known(folder)
    there, _ = known(Path(shutil.copytree(folder, tmp_path / "copy")))
    assert here["path"] != there["path"]
    assert is_same_model(here, there)
    older = {**here, "content": "0123456789abcdef" * 2}
    assert is_same_model(older, here)
    assert not is_same_model({**older, "path": "elsewhere"}, here)


def test_a_damaged_header_is_left_to_the_error_of_loading(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    assert known(folder)[0]["content"]
