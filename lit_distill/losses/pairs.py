"""Reduces objectives on pairs of texts to token-level losses.

Such an objective is a function of the labels' log-probabilities. First all log-probabilities are computed without gradient, then
the objective's gradient g with respect to each of them. The token-level loss g·log q(label) has the same gradient, and the
chunked loss can differentiate it. This costs a second projection of the rows; the full logits are never stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.functional.host import to_device
from lit_distill.objectives import LossTerm, Objective, weighted_sum
from lit_distill.types import Sequences


class PairGradients(NamedTuple):
    """The value of pair objectives, and their gradients with respect to each token's log-probability."""

    loss: Tensor
    """[] the weighted sum, with gradient only for the objectives' own parameters."""
    gradients: Tensor
    """[N] derivative of the loss with respect to the log-probability of each target."""
    terms: dict[str, LossTerm]
    """Detached sums of each objective."""


def pair_gradients(
    objectives: Mapping[str, Objective],
    factors: Mapping[str, Tensor | float],
    logprobs: Tensor,
    teacher_logprobs: Tensor | None,
    text: Sequences,
) -> PairGradients:
    """Evaluate objectives on pairs. Pairs without targets, the dummies of ranks without examples, are left out.

    Args:
        objectives: pair objectives by name.
        factors: factor of each objective's sum in the loss.
        logprobs: ``[N]`` the student's log q of the targets, row after row.
        teacher_logprobs: ``[N]`` the teacher's log p of the same targets, if an objective needs it.
        text: 2B texts: first the chosen ones, then the rejected ones.
    """
    targets = text.target_mask
    logprobs = logprobs.detach().requires_grad_(torch.is_grad_enabled())
    signals = split_pairs(targets, "chosen_mask", "rejected_mask")
    signals |= split_pairs(scatter_rows(logprobs, targets), "student_chosen_logprobs", "student_rejected_logprobs")
    if teacher_logprobs is not None:
        scores = scatter_rows(teacher_logprobs, targets)
        signals |= split_pairs(scores, "teacher_chosen_logprobs", "teacher_rejected_logprobs")
    chosen, rejected = text.masks.targets.any(dim=-1).chunk(2)
    real = to_device((chosen & rejected).nonzero()[:, 0], targets.device)
    loss, terms = weighted_sum(objectives, factors, {name: rows[real] for name, rows in signals.items()})
    if not loss.requires_grad:
        return PairGradients(loss, torch.zeros_like(logprobs), terms)
    (gradients,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    return PairGradients(loss, gradients, terms)


class LinearizedPairLoss(Objective):
    """Σ g·log q(label): has the same gradient as a function of the log-probabilities whose derivatives are g."""

    def forward(self, student_logits: Tensor, labels: Tensor, logprob_gradients: Tensor) -> LossTerm:
        """The sum over the rows; only its gradient is used, not its value."""
        losses = F.cross_entropy(student_logits, labels, reduction="none")
        return LossTerm(-(losses * logprob_gradients).sum(), len(labels))


def scatter_rows(rows: Tensor, targets: Tensor) -> Tensor:
    """[2B, S]: ``rows`` at the targets, 0 elsewhere."""
    return rows.new_zeros(targets.shape).masked_scatter(targets, rows)


def split_pairs(values: Tensor, first: str, second: str) -> dict[str, Tensor]:
    """The first half of the rows under the name ``first``, the second half under ``second``."""
    chosen, rejected = values.chunk(2)
    return {first: chosen, second: rejected}
