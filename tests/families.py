"""Tiny random models of five architectures (each under 100,000 parameters) and a tokenizer for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # the process that hands tests to workers reads this file too, and runs no model
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 64
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
ROTARY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **IDS,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_positions": 64, **IDS}),
    "llama": ("LlamaConfig", ROTARY),
    "qwen2": ("Qwen2Config", {**ROTARY, "tie_word_embeddings": True}),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            **IDS,
        },
    ),
    "gemma2": ("Gemma2Config", {**ROTARY, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """One architecture after the other."""
    return request.param


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """Build a seeded random model of an architecture; keyword arguments go to its config."""
    import torch
    import transformers

    def make(family: str, num_layers: int = 4, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        config_class, arguments = FAMILIES[family]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            shape = {**arguments, "num_hidden_layers": num_layers, **overrides}
            config = getattr(transformers, config_class)(**shape)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for parameter in model.parameters():  # larger than at initialisation, so that every layer is felt
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.3)
        assert sum(parameter.numel() for parameter in model.parameters()) < 100_000
        return model.eval()

    return make


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Build a word-level tokenizer from a list of tokens, in the order of their ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(tokens: list[str] | None = None, eos: str = "</s>", pad: str | None = None) -> PreTrainedTokenizerFast:
        words = tokens or ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(VOCABULARY - 3))]
        backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": eos, "pad_token": pad}
        return PreTrainedTokenizerFast(tokenizer_object=backend, **special)

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """``[2, 12]`` token ids."""
    import torch

    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
