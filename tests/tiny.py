"""One tiny random Llama and one ragged text, for tests that need any."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import lit_distill
from lit_distill.types import Sequences

ASSETS = Path(lit_distill.__file__).parent / "assets"
VOCABULARY = 41


def tiny_llama(hidden: int = 16, vocabulary: int = VOCABULARY, **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        **config,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, **settings)).eval()


def ragged_text(rows: int = 5, width: int = 12, vocabulary: int = VOCABULARY) -> Sequences:
    """Right-padded rows of different lengths, whose first three tokens are the prompt."""
    ids = torch.randint(0, vocabulary, (rows, width))
    lengths = torch.arange(width, width - rows, -1)[:, None]
    columns = torch.arange(width)
    attention: Tensor = columns < lengths
    return Sequences(ids, attention.long(), attention & (columns >= 3))
