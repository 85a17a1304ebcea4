"""Token-level metrics on held-out text: likelihood under the student, and agreement of student and teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lit_distill.functional import forward_kl, reverse_kl
from lit_distill.objectives import LossTerm, Objective


class PerplexityTerms(Objective):
    """Cross-entropy of the text under the student; an objective, so that it runs on the same chunks as the others."""

    metric_names = ("nll",)

    def forward(self, student_logits: Tensor, labels: Tensor) -> LossTerm:
        """Sum of −log q(label) over the rows, in nats."""
        losses = F.cross_entropy(student_logits, labels, reduction="none")
        return LossTerm(losses.sum(), len(labels), {"nll": losses.sum()})


class AgreementTerms(Objective):
    """`PerplexityTerms` for student and teacher, and both KL divergences and the top-1 agreement between the two."""

    metric_names = ("nll", "teacher_nll", "forward_kl", "reverse_kl", "top1_agreement")

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> LossTerm:
        """Sums over the rows of the metrics of both models."""
        losses = F.cross_entropy(student_logits, labels, reduction="none")
        agree = (student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)).float()
        return LossTerm(
            losses.sum(),
            len(labels),
            {
                "nll": losses.sum(),
                "teacher_nll": F.cross_entropy(teacher_logits, labels, reduction="sum"),
                "forward_kl": forward_kl(student_logits, teacher_logits).sum(),
                "reverse_kl": reverse_kl(student_logits, teacher_logits).sum(),
                "top1_agreement": agree.sum(),
            },
        )


class TermMeanMetric(Metric):
    """Several means, each a sum divided by its count, exact over batches and ranks.

    Args:
        names: names of the sums that `update` gets.
    """

    full_state_update = False
    totals: Tensor
    counts: Tensor

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.add_state("totals", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, totals: dict[str, Tensor], counts: dict[str, Tensor | int]) -> None:
        """Add the sums ``[]`` and counts of a batch, by name."""
        device = self.totals.device
        self.totals += torch.stack([totals[name].double().to(device) for name in self.names])
        self.counts += torch.stack([torch.as_tensor(counts[name], device=device).double() for name in self.names])

    def compute(self) -> dict[str, Tensor]:
        """The means by name, ``[]`` each, NaN if the count is 0; and ``count``, the count of the first name."""
        means = dict(zip(self.names, (self.totals / self.counts).float(), strict=True))
        return {**means, "count": self.counts[0]}
