"""Token losses computed a chunk of logits at a time, with forward and backward of the head and the objectives in one pass.

For each chunk of rows, the logits of student and teacher are computed, the objectives' weighted sum is differentiated
with respect to the student's logits, and the gradients of the hidden rows and of the head are accumulated: one student
projection, one teacher projection and two gradient products. The loss is a sum over rows, so chunking does not change it.
No tensor of size [N, V] is ever allocated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lit_distill.functional.host import to_device
from lit_distill.models.lm_head import LMHead, chunk_rows_for
from lit_distill.objectives import LossTerm, Objective, add_terms, weighted_sum
from lit_distill.teachers.base import PartedRows, TeacherRows, part_of


class ChunkedTokenLoss:
    """Token-level objectives on N rows, computed a chunk at a time.

    Args:
        objectives: by name.
        factors: the factor of each objective's sum in the loss: a number or a scalar tensor; typically weight / count.
        head: the student's LM head.
        signals: ``[N]`` each, by name; must contain ``labels``.
        teacher: the teacher's predictions for the same rows, if an objective needs them.
        reference: the reference model's, if an objective needs them.
        chunk_rows: rows in a chunk.
        row_limits: for an objective's name, the number of rows, from the first, that it gets; default: all rows.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        factors: Mapping[str, Tensor | float],
        head: LMHead,
        signals: Mapping[str, Tensor],
        teacher: TeacherRows | None = None,
        chunk_rows: int | None = None,
        row_limits: Mapping[str, int] | None = None,
        reference: TeacherRows | None = None,
    ) -> None:
        self.objectives = objectives
        self.factors = factors
        self.head = head
        self.signals = signals
        self.teacher = teacher
        self.reference = reference
        self.chunk_rows = chunk_rows or chunk_rows_for(head)
        self.row_limits = row_limits or {}
        self.terms: dict[str, LossTerm] = {}

    def __call__(self, hidden: Tensor) -> Tensor:
        """The weighted sum of all objectives, a float32 scalar with gradient; afterwards `terms` has the detached sums of each.

        Args:
            hidden: ``[N, H]`` hidden rows of the student.
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
        edges = sorted({0, rows, *self.row_limits.values()})
        size = self.chunk_rows
        chunks = [slice(i, min(i + size, end)) for start, end in pairwise(edges) for i in range(start, end, size)]
        # An objective without targets on this rank still gets an empty chunk, since other ranks expect its sums.
        return chunks if chunks and 0 not in self.row_limits.values() else [slice(0, 0), *chunks]

    def _weighted_sum(self, student_logits: Tensor, part: slice) -> Tensor:
        active = {name: o for name, o in self.objectives.items() if part.stop <= self.row_limits.get(name, part.stop)}
        signals = {"student_logits": student_logits, **{name: signal[part] for name, signal in self.signals.items()}}
        if any("reference_logits" in objective.needs for objective in active.values()):
            assert self.reference is not None
            signals["reference_logits"] = self.reference.logits(part)
        compared = {name: objective for name, objective in active.items() if "teacher_logits" in objective.needs}
        if isinstance(self.teacher, PartedRows) and compared:
            loss = self._sum_of_parts(compared, signals, part, self.teacher)
            active = {name: objective for name, objective in active.items() if name not in compared}
            return loss + self._added(active, signals) if active else loss
        if compared:
            assert self.teacher is not None
            signals["teacher_logits"] = self.teacher.logits(part)
        return self._added(active, signals)

    def _added(
        self, objectives: Mapping[str, Objective], signals: Mapping[str, Tensor], teacher: str | None = None
    ) -> Tensor:
        """The weighted sum of the objectives; their terms are added to `terms`, of a named teacher also by its name."""
        loss, terms = weighted_sum(objectives, self.factors, signals)
        if teacher is not None:
            terms |= {f"{name}/{teacher}": term._replace(metrics={}) for name, term in terms.items()}
        for name, term in terms.items():
            self.terms[name] = add_terms(self.terms[name], term) if name in self.terms else term
        return loss

    def _sum_of_parts(
        self, objectives: Mapping[str, Objective], signals: Mapping[str, Tensor], rows: slice, teacher: PartedRows
    ) -> Tensor:
        """The weighted sum over the rows and tokens that each part of the teacher answers for."""
        student = signals["student_logits"]
        loss = student.new_zeros(())
        for part in teacher.parts:
            local, inside = part_of(part, rows)
            here = dict(signals)
            if len(inside) < len(student):
                index = to_device(inside, student.device)
                here = {name: signal[index] for name, signal in signals.items()}
            if part.tokens is not None:
                for name in here.keys() & {"student_logits", "reference_logits"}:
                    here[name] = here[name][:, part.tokens]
                here["labels"] = torch.searchsorted(part.tokens, here["labels"])
            if len(inside):
                assert part.rows is not None
                here["teacher_logits"] = part.rows.logits(local)
            else:
                here["teacher_logits"] = torch.zeros_like(here["student_logits"])
            loss = loss + self._added(objectives, here, part.name)
        return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: ChunkedTokenLoss, hidden: Tensor, weight: Tensor, bias: Tensor | None, *parameters: nn.Parameter
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
        ctx.gradients = ()  # they are scaled in place, so a second backward must not use them again
        assert gradients, "the chunked loss was differentiated twice"
        scaled = (
            None if gradient is None else gradient.mul_(grad_value).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (None, *scaled)
