"""Students and teachers: Hugging Face causal language models as a body and a head."""

from lit_distill.models.causal_lm import CausalLM, check_head
from lit_distill.models.chunked_head import TokenLoss, label_logprobs
from lit_distill.models.head import Head
from lit_distill.models.lora import LoraSpec
from lit_distill.models.measurement import Measurement, global_counts
from lit_distill.models.pair import build_pair
from lit_distill.models.roles import check_specs
from lit_distill.models.spec import ModelSpec, load_model, load_tokenizer
from lit_distill.models.teacher import FrozenTeacher
from lit_distill.models.vocabulary import common_vocabulary_size, shared_ids, stop_token_ids

__all__ = [
    "CausalLM",
    "FrozenTeacher",
    "Head",
    "LoraSpec",
    "Measurement",
    "ModelSpec",
    "TokenLoss",
    "build_pair",
    "check_head",
    "check_specs",
    "common_vocabulary_size",
    "global_counts",
    "label_logprobs",
    "load_model",
    "load_tokenizer",
    "shared_ids",
    "stop_token_ids",
]
