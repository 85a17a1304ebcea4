"""Distributions over the vocabulary as finite float32 log-probabilities; the basis of the divergences."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IMPOSSIBLE = -1e4  # log-probability of a token with logit -inf: its exp() is 0 in float32, and 0 times it is 0, not NaN
NO_MASS = -100.0  # exp() of less is 0 in float32


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Per-token entropy of one distribution.

    Args:
        logits: ``[..., V]`` scores; receives the gradient.
        temperature: divides them, > 0.

    Returns:
        ``[...]`` float32, nats, between 0 and log V.
    """
    _check_temperature(temperature)
    log_q = finite_log_softmax(logits, temperature)
    return -(log_q.exp() * log_q).sum(-1)


def student_and_teacher_log_probs(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The student's log-probabilities with their graph and the teacher's without, finite and in float32."""
    _check_temperature(temperature)
    check_same_vocabulary(student_logits, teacher_logits)
    log_q = finite_log_softmax(student_logits, temperature)
    with torch.no_grad():
        log_p = finite_log_softmax(teacher_logits, temperature)
    return log_q, log_p


def finite_log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """float32 log-softmax with impossible tokens at a finite floor, through which no gradient passes."""
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    return logits.log_softmax(-1).clamp(min=IMPOSSIBLE)


def log_mixture(p: Tensor, q: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q), finite where both are 0."""
    return torch.add(p * share, q, alpha=1 - share).clamp_(min=torch.finfo(p.dtype).tiny).log_()


def with_gradient(value: Tensor, log_q: Tensor, gradient: Tensor) -> Tensor:
    """``value`` [...] in the graph, with ``gradient`` [..., V] as its derivative by ``log_q``."""
    attached: Tensor = _WithGradient.apply(value, log_q, gradient)
    return attached


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, log_q: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG004 - an input of the graph
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, grad_value.unsqueeze(-1) * gradient, None


@torch.no_grad()
def has_support_gap(log_p: Tensor, log_q: Tensor) -> Tensor:
    """[...] bool: p has mass on a token that is impossible under q."""
    return ((log_q <= IMPOSSIBLE) & (log_p > NO_MASS)).any(-1)


def infinite_where(condition: Tensor) -> Tensor:
    """+inf where the condition holds, else 0. Adding it to a value does not change the gradient."""
    return torch.zeros_like(condition, dtype=torch.float32).masked_fill_(condition, torch.inf)


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature}.")


def check_same_vocabulary(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Reject logits of different shapes, with a message about how they differ.

    Raises:
        ValueError: if the shapes differ.
    """
    student, teacher = tuple(student_logits.shape), tuple(teacher_logits.shape)
    if student == teacher and student:
        return
    if student and teacher and student[:-1] == teacher[:-1]:
        common = min(student[-1], teacher[-1])
        raise ValueError(
            f"The student scores {student[-1]} tokens and the teacher {teacher[-1]}. If the tokenizers are equal and "
            "only the padding of the vocabularies differs, slice both to the common tokens, "
            f"logits[..., :{common}]; otherwise choose a student and a teacher with the same tokenizer."
        )
    raise ValueError(
        f"Expected student_logits and teacher_logits of one shape [..., V], got {list(student)} and {list(teacher)}: "
        "score the same positions with both models."
    )
