"""MiniLLM's Long term: reverse KL by policy gradient, clipped as in PPO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_distill.functional import clipped_surrogate, is_clipped
from lit_distill.objectives.base import LossTerm, Objective, sum_over_tokens

if TYPE_CHECKING:
    from torch import Tensor


class PolicyGradient(Objective):
    """−A·ρ, clipped, with ρ = q_new/p̃ and the advantage A from the source: the effect of a token on the rewards after it.

    Clipping biases the gradient as soon as the student has changed since sampling. Otherwise the bias is that of the source's
    scoring.

    Args:
        weight: factor in the loss.
        clip_range: ε > 0; ρ is clipped to 1 ± ε. Null for no clipping.
        temperature: sampling temperature of the rollouts; must equal the source's.

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
        """Per-token clipped surrogate; logs the share of tokens whose gradient is 0 by clipping."""
        logits = student_logits / self.temperature
        logprobs = logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(dim=-1)
        arguments = (logprobs, old_logprobs, advantages, importance_weights, self.clip_range)
        return sum_over_tokens(clipped_surrogate(*arguments), clip_fraction=is_clipped(*arguments).float())
