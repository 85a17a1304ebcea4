"""One tiny random Llama, for tests that need any model."""

from __future__ import annotations

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
