"""Objectives on pairs of texts, brought down to tokens.

Such an objective is a function of log-probabilities, and its gradient with respect to each of them is known once all
are. From there on it is a token-level objective like any other: g·log q of every label, which the chunked head
differentiates. The price is a second projection of the rows, without gradient; logits never live.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.objectives import LossTerm, Objective, weighted_sum


class Comparison(NamedTuple):
    """What objectives say of pairs, and what they ask of each token."""

    loss: Tensor
    """[] the weighted sum, with a graph to the objectives' own parameters."""
    gradients: Tensor
    """[N] its derivative with respect to the log-probability of each target."""
    terms: dict[str, LossTerm]
    """Each objective's detached sums."""


def compare(
    objectives: Mapping[str, Objective],
    factors: Mapping[str, Tensor | float],
    logprobs: Tensor,
    teacher_logprobs: Tensor | None,
    targets: Tensor,
) -> Comparison:
    """Apply objectives to pairs; a pair without targets, as a rank without items has one, counts nowhere.

    Args:
        objectives: that measure pairs, by name.
        factors: of each one's sum in the loss.
        logprobs: ``[N]`` log q of the targets, row after row.
        teacher_logprobs: ``[N]`` log p of the same, where an objective asks for it.
        targets: ``[2B, S]`` bool: the chosen texts, then the rejected.
    """
    logprobs = logprobs.detach().requires_grad_(torch.is_grad_enabled())
    signals = _both_halves(targets, "chosen_mask", "rejected_mask")
    signals |= _both_halves(_spread(logprobs, targets), "student_chosen_logprobs", "student_rejected_logprobs")
    if teacher_logprobs is not None:
        scores = _spread(teacher_logprobs, targets)
        signals |= _both_halves(scores, "teacher_chosen_logprobs", "teacher_rejected_logprobs")
    real = signals["chosen_mask"].any(dim=-1) & signals["rejected_mask"].any(dim=-1)
    loss, terms = weighted_sum(objectives, factors, {name: rows[real] for name, rows in signals.items()})
    if not loss.requires_grad:
        return Comparison(loss, torch.zeros_like(logprobs), terms)
    (gradients,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    return Comparison(loss, gradients, terms)


class AskedOfTokens(Objective):
    """Σ g·log q(label): has the gradient of any function of the log-probabilities whose derivatives are g."""

    def forward(self, student_logits: Tensor, labels: Tensor, logprob_gradients: Tensor) -> LossTerm:
        """The sum over the rows; its value means nothing."""
        losses = F.cross_entropy(student_logits, labels, reduction="none")
        return LossTerm(-(losses * logprob_gradients).sum(), len(labels))


def _spread(rows: Tensor, targets: Tensor) -> Tensor:
    """[2B, S]: ``rows`` at the targets, 0 elsewhere."""
    return rows.new_zeros(targets.shape).masked_scatter(targets, rows)


def _both_halves(values: Tensor, first: str, second: str) -> dict[str, Tensor]:
    chosen, rejected = values.chunk(2)
    return {first: chosen, second: rejected}
