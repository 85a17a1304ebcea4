"""Loads the models of a run together, since they share one vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from lit_distill.models.build import ModelBuilder
from lit_distill.teachers.base import LoadedTeacher, Opening, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_distill.distributed import Sharding
    from lit_distill.models import CausalLM, ModelSpec


def load_models(
    student: ModelSpec,
    frozen: Mapping[str, Teacher],
    tokenizer: PreTrainedTokenizerBase,
    device_type: str = "cpu",
    sharding: Sharding | None = None,
    padding_free: bool = True,
) -> tuple[CausalLM, dict[str, LoadedTeacher]]:
    """Load the student and what it is compared with. Default dtypes: float32, or as stored with adapters; as stored for the others.

    Args:
        student: spec under ``model.student``.
        frozen: ``teacher`` and ``reference``, as far as the run has them, by their key below ``model``.
        tokenizer: the student's.
        device_type: where the models will run.
        sharding: how all are sharded over the ranks, all of which must call this function; None loads them whole.
        padding_free: let each pack texts into fewer rows if it keeps them apart.

    Raises:
        ValueError: if a model cannot be loaded, or one of the others does not fit the student.
    """
    builder = ModelBuilder(student, "student", torch.float32 if student.lora is None else None, sharding)
    rows = builder.model.get_output_embeddings().weight.shape[0]
    opening = Opening(tokenizer, student, rows, device_type, sharding, padding_free)
    sizes = [size for key, teacher in frozen.items() if (size := teacher.open(opening, key)) is not None]
    vocabulary_size = min(sizes, default=None)
    lm = builder.finish(vocabulary_size, padding_free)
    return lm, {key: teacher.load(vocabulary_size, lm) for key, teacher in frozen.items()}
