"""Per-token rewards, advantages and importance weights of MiniLLM rollouts.

The paper and its reference code differ. Each difference is an argument:

| | MiniLLM (paper) | reference code |
|---|---|---|
| `gamma` | 1 | 0.95 |
| `include_current` | false: R_{t+1} | true: R_t, so r_t is counted twice, here and in the Single term |
| `length_normalize` | true | true |
| `standardize` | null | padded: the zeros of the padding are included |
| `reward_scale`, `reward_clip` | 1, null | 0.5, 100 |
| `importance_weight` | token | token |
| `ReverseKL.importance_weighted` | true | false |
| corpus | `NextToken` | 0.5 `NextToken` + 0.5 `ForwardKL` |

Beyond both: `extrapolation` (G-OPD, https://arxiv.org/abs/2602.12125) and scores of whole responses. A score is paid at the last
token and counts for every token of its response, that one included, since no Single term stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.functional import decision_weights, reward_to_go, scale_and_clip_rewards, standardize

if TYPE_CHECKING:
    from lit_distill.types import Responses


@dataclass
class AdvantageConfig:
    """How rewards, advantages and importance weights are computed from log-probabilities.

    YAML: ``model.source.init_args.scoring``. The defaults are those of the paper.
    """

    gamma: float = 1.0
    """Discount per token, in [0, 1]."""
    include_current: bool = False
    """Whether the return of a token includes its own reward."""
    length_normalize: bool = True
    """Divide each return by the number of rewards in it."""
    standardize: Literal["responses", "padded"] | None = None
    """Shift and scale advantages to mean 0 and variance 1: over response tokens, or over the padded batch (reference code)."""
    reward_scale: float = 1.0
    """Rewards are divided by it."""
    reward_clip: float | None = None
    """Rewards are clipped to ± this value after scaling; null does not clip."""
    importance_weight: Literal["token", "prefix", "exact"] = "token"
    """Importance weight that corrects for the teacher's share in the sampler: of one token, of the whole prefix, or the unbiased
    per-decision products."""
    extrapolation: float = 1.0
    """λ > 0 of the reward log(p/q) + (λ-1) log(p/r) with the reference model r: past the teacher if λ > 1, to the reference if
    λ < 1. Over whole responses its optimum is p^λ r^(1-λ), normalised. Other than 1 needs ``model.reference``, and as the Single
    term `ExtrapolatedReverseKL` of the same ``scale``."""

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma: expected a number in [0, 1], got {self.gamma}.")
        scale_and_clip_rewards(torch.zeros(()), self.reward_scale, self.reward_clip)
        if not 0 < self.extrapolation < math.inf:
            raise ValueError(f"extrapolation: expected a finite number > 0, got {self.extrapolation}.")

    @torch.no_grad()
    def signals(
        self,
        responses: Responses,
        alpha: float,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
        reference_logprobs: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``[B, T]`` float32 each: log-probabilities, rewards, advantages and importance weights of a mixed rollout.

        Args:
            responses: with the log-probabilities of student and teacher.
            alpha: share of the teacher in the sampler.
            sum_over_ranks: sums a tensor over all ranks, so that `standardize` uses all rollouts of a phase.
            reference_logprobs: ``[B, T]`` log-probabilities of the tokens under the reference, for ``extrapolation``.
            scores: ``[B]`` weighted scores of the responses, in nats.
        """
        assert responses.teacher_logprobs is not None
        mask, student, teacher = responses.mask, responses.logprobs, responses.teacher_logprobs
        weights = decision_weights(student, teacher, alpha, mask, self.importance_weight)
        rewards = teacher - student
        if self.extrapolation != 1:
            assert reference_logprobs is not None
            rewards = rewards + (self.extrapolation - 1) * (teacher - reference_logprobs)
        rewards = scale_and_clip_rewards(rewards, self.reward_scale, self.reward_clip)
        advantages = reward_to_go(
            rewards * weights.rewards,
            mask,
            gamma=self.gamma,
            include_current=self.include_current,
            length_normalize=self.length_normalize,
        )
        if scores is not None:
            paid = scores[:, None] * last_tokens(mask) * weights.rewards
            advantages = advantages + reward_to_go(
                paid, mask, gamma=self.gamma, include_current=True, length_normalize=False
            )
        if self.standardize is not None:
            padded = self.standardize == "padded"
            advantages = standardize(advantages, mask, include_padding=padded, sum_over_ranks=sum_over_ranks)
        return {
            "old_logprobs": student,
            "teacher_logprobs": teacher,
            "advantages": advantages,
            "importance_weights": weights.long,
            "single_step_weights": weights.single,
            "rewards": rewards * mask,
        }


def last_tokens(mask: Tensor) -> Tensor:
    """``[B, T]`` bool: the last token of each response of a mask ``[B, T]``; none of an empty one."""
    return mask & ~F.pad(mask[:, 1:], (0, 1))
