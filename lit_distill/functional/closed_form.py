"""Evaluates a divergence and its gradient in closed form, a block of rows at a time; the basis of the divergences.

Autograd would keep several [N, V] tensors and read them from memory again. Here all temporaries belong to a block that stays in the
processor's cache, and only the gradient is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_distill.functional.distributions import (
    IMPOSSIBLE,
    NO_MASS,
    check_same_vocabulary,
    check_temperature,
    tempered_log_softmax,
)
from lit_distill.functional.fused import KINDS, evaluate_fused, runs_fused

BLOCK_BYTES = 2 * 2**20
"""Size of one float32 buffer of a block on a CPU. A GPU takes all rows at once: there, more kernel launches cost more."""


class Distribution(NamedTuple):
    """Next-token distributions of a block of rows. A formula may overwrite the tensors, but not the student's ``probs``."""

    probs: Tensor
    """[n, V] float32."""
    logprobs: Tensor
    """[n, V] float32, finite: at least `IMPOSSIBLE`."""
    impossible: Tensor | None
    """[n, V] bool: the tokens at that floor; None if there are none."""


Formula = Callable[..., tuple[Tensor, Tensor]]
"""From student and teacher, and a share if the divergence has one, the value ``[n]`` and its derivative ``[n, V]`` by the student's
log-probabilities.

Terms of the derivative proportional to the student's probabilities may be left out, because log-softmax cancels them.
"""


def evaluate(
    formula: Formula, student_logits: Tensor, teacher_logits: Tensor, temperature: float, *share: float
) -> Tensor:
    """The value ``[...]`` float32 of a formula on logits ``[..., V]``; its gradient reaches ``student_logits`` once.

    Args:
        formula: value and derivative. On a GPU the kernel of `fused` takes its place, if it knows a divergence of this name.
        student_logits: receives the gradient.
        teacher_logits: treated as constant.
        temperature: divides both.
        share: the ``beta``, ``skew`` or ``head_mass`` of the divergence; the formula's last argument.

    Raises:
        ValueError: if the shapes differ or the temperature is not > 0.
    """
    check_temperature(temperature)
    check_same_vocabulary(student_logits, teacher_logits)
    value: Tensor = _Evaluate.apply(student_logits, teacher_logits.detach(), formula, temperature, share)
    return value


def mass_where_impossible(p: Distribution, q: Distribution) -> Tensor | float:
    """+inf for rows in which p has mass on a token that is impossible under q, else 0. Call it before p is overwritten."""
    if q.impossible is None:
        return 0.0
    gap = (q.impossible & (p.logprobs > NO_MASS)).any(-1)
    return torch.zeros_like(gap, dtype=torch.float32).masked_fill_(gap, torch.inf)


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        formula: Formula,
        temperature: float,
        share: tuple[float, ...],
    ) -> Tensor:
        vocabulary = student_logits.shape[-1]
        student, teacher = (logits.reshape(-1, vocabulary) for logits in (student_logits, teacher_logits))
        with_gradient = ctx.needs_input_grad[0]
        name = formula.__name__.removeprefix("_")
        if name in KINDS and runs_fused(student):
            number = share[0] if share else 0.0
            value, gradient = evaluate_fused(name, student, teacher, temperature, number, with_gradient)
        else:
            value, gradient = _in_blocks(formula, student, teacher, temperature, share, with_gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient.view_as(student_logits))
        ctx.temperature, ctx.dtype = temperature, student_logits.dtype
        return value.view(student_logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return ((grad_value / ctx.temperature).unsqueeze(-1) * gradient).to(ctx.dtype), None, None, None, None


def _in_blocks(
    formula: Formula,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    share: tuple[float, ...],
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Value ``[N]`` and, if asked for, gradient by the tempered student logits ``[N, V]``, both float32."""
    value = student.new_empty(len(student), dtype=torch.float32)
    gradient = torch.empty_like(student, dtype=torch.float32) if with_gradient else None
    for rows in _blocks(student):
        q, p = (_distribution(logits[rows], temperature) for logits in (student, teacher))
        value[rows], derivative = formula(q, p, *share)
        if gradient is not None:
            if q.impossible is not None:
                derivative = derivative.masked_fill(q.impossible, 0.0)
            # through log-softmax
            torch.addcmul(derivative, q.probs, derivative.sum(-1, keepdim=True), value=-1, out=gradient[rows])
    return value, gradient


def _blocks(logits: Tensor) -> list[slice]:
    rows, vocabulary = logits.shape
    size = max(rows, 1)
    if logits.device.type == "cpu":  # the same number of rows for each thread
        threads = torch.get_num_threads()
        size = max(1, round(BLOCK_BYTES / (4 * vocabulary * threads))) * threads
    return [slice(start, start + size) for start in range(0, rows, size)]


def _distribution(logits: Tensor, temperature: float) -> Distribution:
    logprobs = tempered_log_softmax(logits, temperature)
    impossible: Tensor | None = None
    if logits.device.type != "cpu" or bool(logprobs.amin() <= IMPOSSIBLE):  # a GPU would have to be waited for
        impossible = logprobs <= IMPOSSIBLE
        logprobs = logprobs.clamp_(min=IMPOSSIBLE)
    return Distribution(logprobs.exp(), logprobs, impossible)
