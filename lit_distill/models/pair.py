"""A student and its teacher, loaded and cut to the tokens they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lit_distill.models.causal_lm import CausalLM, check_head
from lit_distill.models.spec import ModelSpec, load_model, load_tokenizer
from lit_distill.models.vocabulary import common_vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_pair(
    student: ModelSpec, teacher: ModelSpec | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[CausalLM, CausalLM | None]:
    """The student in float32 and the teacher as stored, unless their specs say otherwise.

    Args:
        student: key ``model.student``.
        teacher: key ``model.teacher``; None where nothing needs one.
        tokenizer: the student's.

    Raises:
        ValueError: if a model cannot be loaded, or the two do not share their tokens.
    """
    if teacher is None:
        return CausalLM(_load(student, "model.student", torch.float32), compile_body=student.compile), None
    models = _load(student, "model.student", torch.float32), _load(teacher, "model.teacher", None)
    rows = [model.get_output_embeddings().weight.shape[0] for model in models]
    size = common_vocabulary_size(tokenizer, load_tokenizer(teacher, "model.teacher"), *rows)
    learner, expert = models
    return CausalLM(learner, size, student.compile), CausalLM(expert, size, teacher.compile)


def _load(spec: ModelSpec, key: str, dtype: torch.dtype | None) -> PreTrainedModel:
    model = load_model(spec, key, dtype)
    if model.device.type != "meta":
        check_head(model, key)
    return model
