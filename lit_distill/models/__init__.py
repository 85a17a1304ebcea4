"""Student and teacher models: Hugging Face causal language models, split into a body and an LM head."""

from lit_distill.models.build import ModelBuilder
from lit_distill.models.causal_lm import CausalLM, check_head
from lit_distill.models.lm_head import LMHead, label_logprobs
from lit_distill.models.lora import LoraSpec
from lit_distill.models.roles import validate_specs
from lit_distill.models.spec import ModelSpec, load_model, load_tokenizer
from lit_distill.models.vocabulary import common_vocabulary_size, shared_ids, stop_token_ids

__all__ = [
    "CausalLM",
    "LMHead",
    "LoraSpec",
    "ModelBuilder",
    "ModelSpec",
    "check_head",
    "common_vocabulary_size",
    "label_logprobs",
    "load_model",
    "load_tokenizer",
    "shared_ids",
    "stop_token_ids",
    "validate_specs",
]
