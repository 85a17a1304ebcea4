"""Distributions over the vocabulary as finite float32 log-probabilities; the basis of the divergences."""

from __future__ import annotations

import math

from torch import Tensor

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
    check_temperature(temperature)
    log_q = finite_log_softmax(logits, temperature)
    return -(log_q.exp() * log_q).sum(-1)


def finite_log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """float32 log-softmax with impossible tokens at a finite floor, through which no gradient passes."""
    return tempered_log_softmax(logits, temperature).clamp(min=IMPOSSIBLE)


def tempered_log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """float32 log-softmax of ``logits / temperature``."""
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    return logits.log_softmax(-1)


def check_temperature(temperature: float) -> None:
    """Reject a temperature that is not > 0 and finite."""
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
