"""MiniLLM's Long term: reverse KL by policy gradient, clipped as in PPO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_distill.functional.policy_gradient import clipped_surrogate, is_clipped
from lit_distill.objectives.base import LossTerm, Objective, sum_over_tokens

if TYPE_CHECKING:
    from torch import Tensor


class PolicyGradient(Objective):
    """−A·ρ, clipped, with ρ = q_new/p̃ and the advantage A that the source computed: what a token does to the tokens after it.

    Biased as soon as the student differs from the one that sampled and ρ is clipped; otherwise as biased as the
    source's scoring.

    Args:
        weight: factor in the loss.
        clip_range: ε > 0 around 1 in which ρ may move, or null.
        temperature: of the rollouts; must equal the source's.

    Source: MiniLLM, https://arxiv.org/abs/2306.08543, equations 3 and 7.
    """

    def __init__(self, weight: float = 1.0, clip_range: float | None = 0.2, temperature: float = 1.0) -> None:
        super().__init__(weight)
        if clip_range is not None and not clip_range > 0:
            raise ValueError(f"clip_range: expected a number > 0, or null for no clipping, got {clip_range}.")
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number > 0 for PolicyGradient, got {temperature}.")
        self.clip_range = clip_range
        self.temperature = temperature

    def forward(
        self,
        student_logits: Tensor,
        labels: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        importance_weights: Tensor,
    ) -> LossTerm:
        """Per-token clipped surrogate; logs the share of tokens whose gradient is cut off."""
        logits = student_logits / self.temperature
        logprobs = logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(dim=-1)
        arguments = (logprobs, old_logprobs, advantages, importance_weights, self.clip_range)
        return sum_over_tokens(clipped_surrogate(*arguments), clip_fraction=is_clipped(*arguments).float())
