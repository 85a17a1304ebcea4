"""How well a student predicts a held-out text and agrees with its teacher on it, token by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lit_distill.functional.divergences import forward_kl, reverse_kl
from lit_distill.objectives import LossTerm, Objective


class StudentQuality(Objective):
    """Cross-entropy of the text under the student, as an objective so that it runs on the same chunks."""

    metric_names = ("nll",)

    def forward(self, student_logits: Tensor, labels: Tensor) -> LossTerm:
        """Per-token −log q(label)."""
        losses = F.cross_entropy(student_logits, labels, reduction="none")
        return LossTerm(losses.sum(), len(labels), {"nll": losses.sum()})


class AgreementQuality(Objective):
    """`StudentQuality`, the same for the teacher, and both KL divergences and top-1 agreement between the two."""

    metric_names = ("nll", "teacher_nll", "forward_kl", "reverse_kl", "top1_agreement")

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> LossTerm:
        """Per-token figures of both models."""
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


class TermMeans(Metric):
    """Mean of several sums over their counts, exact over batches and ranks.

    Args:
        names: of the sums that `update` will bring.
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
        """Add a share of the items: ``[]`` sums and their counts, by name."""
        device = self.totals.device
        self.totals += torch.stack([totals[name].double().to(device) for name in self.names])
        self.counts += torch.stack([torch.as_tensor(counts[name], device=device).double() for name in self.names])

    def compute(self) -> dict[str, Tensor]:
        """``[]`` each, by name, NaN where nothing was counted; and ``count``, of the first."""
        means = dict(zip(self.names, (self.totals / self.counts).float(), strict=True))
        return {**means, "count": self.counts[0]}
