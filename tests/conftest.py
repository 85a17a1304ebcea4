"""Tiny random models and texts that every part of the tests may use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_distill.models import CausalLM, FrozenTeacher
from lit_distill.types import Sequences

VOCABULARY = 41


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def tiny_llama(hidden: int = 16, vocabulary: int = VOCABULARY, **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, **settings, **config)).eval()


@pytest.fixture
def student() -> CausalLM:
    return CausalLM(tiny_llama(tie_word_embeddings=True))


@pytest.fixture
def teacher() -> FrozenTeacher:
    return FrozenTeacher(CausalLM(tiny_llama(hidden=24)))


def ragged_text(rows: int = 5, width: int = 12, vocabulary: int = VOCABULARY) -> Sequences:
    """Right-padded rows of different lengths, whose first three tokens are the prompt."""
    ids = torch.randint(0, vocabulary, (rows, width))
    lengths = torch.arange(width, width - rows, -1)[:, None]
    columns = torch.arange(width)
    attention: Tensor = columns < lengths
    return Sequences(ids, attention.long(), attention & (columns >= 3))


@pytest.fixture
def text() -> Sequences:
    return ragged_text()
