"""Metrics of several responses that the student samples for each prompt: pass@k, and the teacher's view of these responses."""

from __future__ import annotations

from math import comb

import torch
from torch import Tensor

from lit_distill.functional import common_share, reverse_kl
from lit_distill.functional.distributions import entropy
from lit_distill.objectives import LossTerm, Objective
from lit_distill.objectives.base import sum_over_tokens
from lit_distill.types import check_sizes


def pass_at_k(num_responses: int, num_correct: Tensor, k: int) -> Tensor:
    r"""The probability that at least one of k responses is correct, estimated from n sampled ones: 1 − C(n−c, k) / C(n, k).

    It is unbiased for every k ≤ n, unlike 1 − (1 − c/n)^k.

    Args:
        num_responses: n, responses sampled for each prompt.
        num_correct: ``[...]`` int64: c, the number of correct ones, for each prompt.
        k: 1 to n.

    Returns:
        ``[...]`` float64 in [0, 1].

    Raises:
        ValueError: if k or a number of correct responses is out of range.

    Source: Chen et al. 2021, https://arxiv.org/abs/2107.03374, section 2.1.
    """
    if not 1 <= k <= num_responses:
        raise ValueError(f"k: expected 1 to {num_responses}, the number of responses, got {k}.")
    if num_correct.numel() and not 0 <= int(num_correct.min()) <= int(num_correct.max()) <= num_responses:
        raise ValueError(f"num_correct: expected 0 to {num_responses}, got {num_correct.tolist()}.")
    chances = [1 - comb(num_responses - correct, k) / comb(num_responses, k) for correct in range(num_responses + 1)]
    return torch.tensor(chances, dtype=torch.float64, device=num_correct.device)[num_correct]


class OnPolicyTerms(Objective):
    """What student and teacher predict along the student's responses; an objective, so that it runs on chunks of logits.

    All in nats at temperature 1, except ``top_k_overlap``: the share of the student's k most probable tokens that are among the
    teacher's k most probable ones. It falls when the student goes to prefixes at which the teacher would say something else.

    Args:
        top_k: k.
    """

    metric_names = (
        "top_k_overlap",
        "on_policy_student_entropy",
        "on_policy_teacher_entropy",
        "on_policy_reverse_kl",
    )

    def __init__(self, top_k: int = 16) -> None:
        super().__init__()
        check_sizes(top_k=top_k)
        self.top_k = top_k

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> LossTerm:
        """Sums over the rows; the loss is the reverse KL, KL(student || teacher)."""
        divergence, size = reverse_kl(student_logits, teacher_logits), min(self.top_k, student_logits.shape[-1])
        values = (
            common_share(*(logits.topk(size).indices for logits in (student_logits, teacher_logits))),
            entropy(student_logits),
            entropy(teacher_logits),
            divergence,
        )
        return sum_over_tokens(divergence, **dict(zip(self.metric_names, values, strict=True)))
