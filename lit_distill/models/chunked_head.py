"""Losses on logits without the logits: head and objectives run on a few rows at a time, forward and backward at once.

For each chunk of rows the student's and the teacher's logits are made, the objectives' weighted sum is differentiated
with respect to the student's logits, and the gradients of the hidden rows and of the head are accumulated: one student
and one teacher projection and two gradient products in all. Totals add, so the result is that of the whole at once.
Nothing of size [N, V] lives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_distill.models.head import Head
from lit_distill.objectives.base import LossTerm, Objective

CHUNK_BYTES = {"cpu": 30 * 2**20}
"""Size of one float32 buffer of a chunk's logits, of which about eight live at a time; elsewhere 128 MB, which keeps a GPU's matrix
units busy. On a processor it is below 32 MB, up to which the C library recycles a buffer instead of handing its pages back."""


def chunk_rows_for(head: Head) -> int:
    """How many rows to take at a time where the user does not say."""
    size = CHUNK_BYTES.get(head.weight.device.type, 128 * 2**20)
    return max(16, size // (4 * len(head.weight)))


class TokenLoss:
    """Token-level objectives on N rows, a chunk at a time.

    Args:
        objectives: by name.
        factors: the factor of each objective's sum in the loss: a number or a scalar tensor; typically weight over count.
        head: the student's.
        signals: ``[N]`` each, by name, among them ``labels``.
        teacher: hidden rows ``[N, H]`` and head of the teacher, where an objective asks for it.
        chunk_rows: rows at a time.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        factors: Mapping[str, Tensor | float],
        head: Head,
        signals: Mapping[str, Tensor],
        teacher: tuple[Tensor, Head] | None = None,
        chunk_rows: int | None = None,
    ) -> None:
        self.objectives = objectives
        self.factors = factors
        self.head = head
        self.signals = signals
        self.teacher = teacher
        self.chunk_rows = chunk_rows or chunk_rows_for(head)
        self.needs = frozenset[str]().union(*(objective.needs for objective in objectives.values()))
        self.terms: dict[str, LossTerm] = {}

    def __call__(self, hidden: Tensor) -> Tensor:
        """The weighted sum of all objectives, a float32 scalar with its graph; `terms` then holds each one's detached sums.

        Args:
            hidden: ``[N, H]`` rows of the student.
        """
        self.terms = {}
        parameters = [p for objective in self.objectives.values() for p in objective.parameters() if p.requires_grad]
        inputs = (hidden, self.head.weight, self.head.bias, *parameters)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            loss: Tensor = _ChunkedLoss.apply(self, *inputs)
            return loss
        loss = hidden.new_zeros((), dtype=torch.float32)
        head = self.head.in_compute_dtype()
        with torch.autocast(hidden.device.type, enabled=False):
            for part in self._chunks(len(hidden)):
                loss += self._weighted_sum(head.logits(hidden[part]), part)
        return loss

    def _chunks(self, rows: int) -> list[slice]:
        # A rank without targets still runs one empty chunk: its objectives' sums are zeros that the other ranks expect.
        return [slice(i, i + self.chunk_rows) for i in range(0, max(rows, 1), self.chunk_rows)]

    def _weighted_sum(self, student_logits: Tensor, part: slice) -> Tensor:
        available: dict[str, Tensor] = {"student_logits": student_logits}
        if "teacher_logits" in self.needs:
            assert self.teacher is not None
            teacher_hidden, teacher_head = self.teacher
            available["teacher_logits"] = teacher_head.logits(teacher_hidden[part])
        loss = student_logits.new_zeros(())
        for name, objective in self.objectives.items():
            given = {
                signal: available[signal] if signal in available else self.signals[signal][part]
                for signal in objective.needs
            }
            term = objective(**given)
            if torch.is_grad_enabled() and not term.total.requires_grad:
                raise ValueError(
                    f"model.objectives.{name}: the total does not depend on the student, so nothing is learnt from it. "
                    "Compute it from student_logits, without detach()."
                )
            loss = loss + self.factors[name] * term.total
            detached = LossTerm(term.total.detach(), term.count, {k: v.detach() for k, v in term.metrics.items()})
            self.terms[name] = add_terms(self.terms[name], detached) if name in self.terms else detached
        return loss


def add_terms(a: LossTerm, b: LossTerm) -> LossTerm:
    """The sums of two shares of the same items."""
    return LossTerm(
        a.total + b.total, a.count + b.count, {name: a.metrics[name] + b.metrics[name] for name in a.metrics}
    )


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: TokenLoss, hidden: Tensor, weight: Tensor, bias: Tensor | None, *parameters: nn.Parameter
    ) -> Tensor:
        _, needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        head = loss.head.in_compute_dtype()
        hidden, dtype = hidden.detach(), head.weight.dtype
        value = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        grad_parameters = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        with torch.autocast(hidden.device.type, enabled=False):
            for part in loss._chunks(len(hidden)):
                rows = hidden[part].to(dtype)
                projection = head.project(rows).float().requires_grad_()
                with torch.enable_grad():
                    total = loss._weighted_sum(head.finish(projection), part)
                    gradient, *others = torch.autograd.grad(
                        total, [projection, *parameters], allow_unused=True, materialize_grads=True
                    )
                value += total.detach()
                del projection, total
                for accumulated, other in zip(grad_parameters, others, strict=True):
                    accumulated.add_(other)
                if grad_bias is not None:
                    grad_bias += gradient.sum(dim=0)
                gradient = gradient.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = gradient @ head.weight
                if grad_weight is not None:
                    if dtype == torch.float32:
                        grad_weight.addmm_(gradient.T, rows)
                    else:
                        grad_weight += gradient.T @ rows
        ctx.gradients = (grad_hidden, grad_weight, grad_bias, *grad_parameters)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, *parameters)]
        return value

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        gradients: Sequence[Tensor | None] = ctx.gradients
        ctx.gradients = ()  # in place, and once: a second backward must not see them scaled twice
        assert gradients, "the chunked loss was differentiated twice"
        scaled = (
            None if gradient is None else gradient.mul_(grad_value).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (None, *scaled)
