"""Tiny random models of any architecture of transformers, from small values for whatever its config calls its sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 53
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # mixtures of experts
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "shared_intermediate_size": 24, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1,
    # recurrent layers
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_dt_rank": 4, "time_step_rank": 4,
    "mamba_n_heads": 4, "mamba_num_heads": 4, "n_mamba_heads": 4, "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_headdim": 16,
    "mamba_n_groups": 1, "mamba_ngroups": 1, "n_groups": 1, "chunk_size": 8, "mamba_chunk_size": 8, "lru_width": 32,
    "attention_window_size": 8, "conv_L_cache": 3, "block_ff_dim": 48,
    # latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
}  # fmt: skip
TWICE = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
BLOCKS = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {}, "falcon_mamba": {}, "mamba2": {"num_heads": 8, "head_dim": 8},
    "xlstm": {"num_heads": 4, "autocast_kernel_dtype": "float32"}, "rwkv": {"attention_hidden_size": 32},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]}, "zamba": BLOCKS, "zamba2": BLOCKS,
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}, "falcon_h1": {}, "olmo_hybrid": TWICE,
    "granitemoehybrid": TWICE, "qwen3_next": TWICE, "lfm2": {**TWICE, "layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
                   "moe_shared_expert_intermediate_size": 24},
    "minimax": TWICE, "recurrent_gemma": {"num_hidden_layers": 3},
    "kimi_linear": {**TWICE, "num_key_value_heads": 4, "linear_attn_config": {"head_dim": 8, "num_heads": 4,
                    "short_conv_kernel_size": 4, "kda_layers": [1, 3], "full_attn_layers": [2, 4]}},
}  # fmt: skip
"""Architectures with layers that keep a state, some between layers that attend."""


def tiny(model_type: str, **settings: Any) -> PreTrainedModel:
    """A random model; every weight is felt."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    kind = CONFIG_MAPPING[model_type]
    known = kind()
    settable = {name for name in SMALL if hasattr(known, name) and not isinstance(getattr(kind, name, None), property)}
    config = kind(**{**{name: SMALL[name] for name in settable}, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size < 200_000, size
    return model
