"""Loads student and teacher together, since all models of a run share one vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lit_distill.models.build import ModelBuilder
from lit_distill.teachers.base import LoadedTeacher, Opening, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lit_distill.distributed import Sharding
    from lit_distill.models import CausalLM, ModelSpec


def load_student_and_teacher(
    student: ModelSpec,
    teacher: Teacher | None,
    tokenizer: PreTrainedTokenizerBase,
    device_type: str = "cpu",
    sharding: Sharding | None = None,
    padding_free: bool = True,
) -> tuple[CausalLM, LoadedTeacher | None]:
    """Load student and teacher. Default dtypes: float32 for the student, or as stored with adapters; as stored for the teacher.

    Args:
        student: spec under ``model.student``.
        teacher: the teacher under ``model.teacher``; None if none is needed.
        tokenizer: the student's.
        device_type: where the models will run.
        sharding: how both are sharded over the ranks, all of which must call this function; None loads them whole.
        padding_free: let each pack texts into fewer rows if it keeps them apart.

    Raises:
        ValueError: if a model cannot be loaded, or the teacher does not fit the student.
    """
    builder = ModelBuilder(student, "student", torch.float32 if student.lora is None else None, sharding)
    if teacher is None:
        return builder.finish(None, padding_free), None
    rows = builder.model.get_output_embeddings().weight.shape[0]
    opening = Opening(tokenizer, student, rows, device_type, sharding, padding_free)
    vocabulary_size = teacher.open(opening, "teacher")
    lm = builder.finish(vocabulary_size, padding_free)
    return lm, teacher.load(vocabulary_size, lm)
