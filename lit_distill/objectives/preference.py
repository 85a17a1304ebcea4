"""Preference of the teacher's words over the student's, token by token: what the released DPKD code does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from lit_distill.functional.preference import token_preference_loss
from lit_distill.objectives.base import LossTerm, Objective, sum_over_tokens

if TYPE_CHECKING:
    from torch import Tensor


class TokenPreference(Objective):
    """At every position, prefer the teacher's most probable token over the student's.

    Nothing is generated. Its value is at least log 2 (``dpkd``), and it has no gradient where both favourites agree.

    Args:
        weight: factor in the loss.
        beta: preference temperature, > 0.
        variant: dpkd, ipo, dpop or reference_free. The released code's simpo divides by the length of the whole text, which
            rows of targets do not know; it is in `lit_distill.functional.token_preference_loss`.
        label_smoothing: probability in [0, 0.5] that the preference is the other way round.
        dpop_lambda: weight of dpop's penalty for a lower probability of the teacher's token than the teacher gives it.

    Source: microsoft/LMOps, dpkd; the paper's own form, on whole sequences, is another method.
    """

    def __init__(
        self,
        weight: float = 1.0,
        beta: float = 0.1,
        variant: Literal["dpkd", "ipo", "dpop", "reference_free"] = "dpkd",
        label_smoothing: float = 0.0,
        dpop_lambda: float = 50.0,
    ) -> None:
        super().__init__(weight)
        self.beta = beta
        self.variant = variant
        self.label_smoothing = label_smoothing
        self.dpop_lambda = dpop_lambda
        self(torch.zeros(1, 2), torch.zeros(1, 2))  # let the function itself judge the settings

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> LossTerm:
        """Per-token preference loss; logs how often the favourites agree."""
        losses = token_preference_loss(
            student_logits,
            teacher_logits,
            beta=self.beta,
            variant=self.variant,
            label_smoothing=self.label_smoothing,
            dpop_lambda=self.dpop_lambda,
        )
        agree = student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)
        return sum_over_tokens(losses, agreement=agree.float())
