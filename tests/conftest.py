"""Tiny random models and texts that every part of the tests may use; `session` says how the tests run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from families import family, ids, make_model, make_tokenizer
from session import (
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_terminal_summary,
    pytest_warning_recorded,
    pytest_xdist_auto_num_workers,
)

if TYPE_CHECKING:  # the process that hands tests to workers reads this file too, and runs no model
    from lit_distill.models import CausalLM
    from lit_distill.teachers import FrozenTeacher
    from lit_distill.types import Sequences

__all__ = ["family", "ids", "make_model", "make_tokenizer"]
__all__ += ["pytest_collection_modifyitems", "pytest_configure"]
__all__ += ["pytest_terminal_summary", "pytest_warning_recorded", "pytest_xdist_auto_num_workers"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
    torch.manual_seed(0)


@pytest.fixture
def student() -> CausalLM:
    from tiny import tiny_llama

    from lit_distill.models import CausalLM

    return CausalLM(tiny_llama(tie_word_embeddings=True))


@pytest.fixture
def teacher() -> FrozenTeacher:
    from tiny import tiny_llama

    from lit_distill.models import CausalLM
    from lit_distill.teachers import FrozenTeacher

    return FrozenTeacher(CausalLM(tiny_llama(hidden=24)))


@pytest.fixture
def text() -> Sequences:
    from tiny import ragged_text

    return ragged_text()


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a random student and a random teacher that share the embedded tokenizer."""
    import torch
    from tiny import ASSETS, tiny_llama
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "student")
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    folders = []
    for name, hidden in (("student", 16), ("teacher", 24)):
        torch.manual_seed(len(name))
        folder = tmp_path_factory.mktemp("models") / name
        tiny_llama(hidden, len(tokenizer), max_position_embeddings=512, **ids).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1]
