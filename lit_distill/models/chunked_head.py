"""Losses on logits without the logits: head and objectives run on a few rows at a time, forward and backward at once.

For each chunk of rows the student's and the teacher's logits are made, the objectives' weighted sum is differentiated
with respect to the student's logits, and the gradients of the hidden rows and of the head are accumulated: one student
and one teacher projection and two gradient products in all. Totals add, so the result is that of the whole at once.
Nothing of size [N, V] lives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_distill.models.head import Head
from lit_distill.objectives import LossTerm, Objective, add_terms, weighted_sum

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
        leading: how many of the rows, counted from the first, an objective sees; all by default.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        factors: Mapping[str, Tensor | float],
        head: Head,
        signals: Mapping[str, Tensor],
        teacher: tuple[Tensor, Head] | None = None,
        chunk_rows: int | None = None,
        leading: Mapping[str, int] | None = None,
    ) -> None:
        self.objectives = objectives
        self.factors = factors
        self.head = head
        self.signals = signals
        self.teacher = teacher
        self.chunk_rows = chunk_rows or chunk_rows_for(head)
        self.leading = leading or {}
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
        edges = sorted({0, rows, *self.leading.values()})
        size = self.chunk_rows
        chunks = [slice(i, min(i + size, end)) for start, end in pairwise(edges) for i in range(start, end, size)]
        # An objective without targets on this rank still sees an empty chunk: the other ranks expect its sums.
        return chunks if chunks and 0 not in self.leading.values() else [slice(0, 0), *chunks]

    def _weighted_sum(self, student_logits: Tensor, part: slice) -> Tensor:
        seen = {name: o for name, o in self.objectives.items() if part.stop <= self.leading.get(name, part.stop)}
        signals = {"student_logits": student_logits, **{name: signal[part] for name, signal in self.signals.items()}}
        if any("teacher_logits" in objective.needs for objective in seen.values()):
            assert self.teacher is not None
            teacher_hidden, teacher_head = self.teacher
            signals["teacher_logits"] = teacher_head.logits(teacher_hidden[part])
        loss, terms = weighted_sum(seen, self.factors, signals)
        for name, term in terms.items():
            self.terms[name] = add_terms(self.terms[name], term) if name in self.terms else term
        return loss


@torch.no_grad()
def label_logprobs(head: Head, hidden: Tensor, labels: Tensor, chunk_rows: int | None = None) -> Tensor:
    """Log-probability of each label, ``[N]`` float32, a chunk of rows at a time and without gradient.

    Args:
        head: in the dtype it is to be applied in.
        hidden: ``[N, H]``.
        labels: ``[N]`` int64.
        chunk_rows: rows at a time.
    """
    size = chunk_rows or chunk_rows_for(head)
    parts = [slice(i, i + size) for i in range(0, max(len(hidden), 1), size)]
    return torch.cat([-F.cross_entropy(head.logits(hidden[p]), labels[p], reduction="none") for p in parts])


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
