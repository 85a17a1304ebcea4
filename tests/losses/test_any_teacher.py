"""Objectives work with every teacher that has the interface: they see nothing of it but logits of the asked rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_distill.losses import ObjectiveEvaluator
from lit_distill.models import CausalLM
from lit_distill.objectives import DirectPreference, ForwardKL, NextToken
from lit_distill.teachers import Teacher, TeacherRows
from lit_distill.types import Pairs, Sequences


class UniformRows:
    def __init__(self, vocabulary_size: int) -> None:
        self.vocabulary_size, self.asked = vocabulary_size, []

    def logits(self, rows: slice) -> Tensor:
        self.asked.append(rows)
        return torch.zeros(rows.stop - rows.start, self.vocabulary_size)

    def label_logprobs(self, labels: Tensor, chunk_rows: int | None = None) -> Tensor:
        return torch.full(labels.shape, -math.log(self.vocabulary_size))


class UniformTeacher:
    """Every token is as likely as any other."""

    def __init__(self, vocabulary_size: int) -> None:
        self.answer = UniformRows(vocabulary_size)
        self.calls = 0

    def rows(self, sequences: Sequences) -> TeacherRows:
        self.calls += 1
        return self.answer


def test_a_divergence_from_a_teacher_that_is_no_model(student: CausalLM, text: Sequences) -> None:
    teacher: Teacher = UniformTeacher(student.vocabulary_size)
    evaluator = ObjectiveEvaluator({"kd": ForwardKL()}, student, teacher, "model.objectives", chunk_rows=3)
    loss, terms = evaluator(text, {"kd": 1.0})
    log_q = student.head().logits(student.target_rows(text)).log_softmax(dim=-1)
    expected = (-math.log(student.vocabulary_size) - log_q.mean(dim=-1)).sum()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    assert terms["kd"].count == len(log_q)
    assert teacher.answer.asked == [slice(i, min(i + 3, len(log_q))) for i in range(0, len(log_q), 3)]


def test_it_does_not_run_for_objectives_that_do_not_ask(student: CausalLM, text: Sequences) -> None:
    teacher = UniformTeacher(student.vocabulary_size)
    ObjectiveEvaluator({"ce": NextToken()}, student, teacher, "model.objectives")(text, {"ce": 1.0})
    assert teacher.calls == 0


def test_pairs_ask_for_log_probabilities_of_labels_alone(student: CausalLM, text: Sequences) -> None:
    teacher = UniformTeacher(student.vocabulary_size)
    evaluator = ObjectiveEvaluator({"dpkd": DirectPreference()}, student, teacher, "model.objectives")
    loss, _ = evaluator(Pairs(text, text), {"dpkd": 1.0})
    torch.testing.assert_close(
        loss.detach(), len(text) * torch.tensor(2.0).log(), rtol=1e-5, atol=1e-5
    )  # equal responses
    assert teacher.calls == 1
    assert not teacher.answer.asked
