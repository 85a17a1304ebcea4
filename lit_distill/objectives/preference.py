"""Preference of the teacher's words over the student's: of whole texts, as in DPKD's paper, or of tokens, as in its code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from lit_distill.functional.preference import (
    WITHOUT_TEACHER,
    PreferenceVariant,
    direct_preference_loss,
    implicit_reward,
    token_preference_loss,
)
from lit_distill.objectives.base import TEACHER_OF_PAIRS, LossTerm, Objective, sum_over_tokens

if TYPE_CHECKING:
    from torch import Tensor


class DirectPreference(Objective):
    """DPKD: prefer the teacher's (or the dataset's) response over the student's own, on pairs from `ResponsePairs`.

    Its gradient vanishes in the mean where student and teacher agree, and has no lower bound on the log-probability of the
    rejected text: watch ``rejected_logprob``, and add `NextToken`, which sees the chosen text, and the corpus loss.

    Args:
        weight: factor in the loss.
        beta: preference temperature, > 0.
        variant: dpkd, ipo, cpo, simpo, dpop or reference_free; cpo, simpo and reference_free do not ask the teacher.
        length_normalize: divide every log-probability by its text's length.
        label_smoothing: probability in [0, 0.5] that the preference is the other way round.
        target_margin: SimPO's γ, in units of reward.
        dpop_lambda: weight of dpop's penalty for losing the chosen text.
        cpo_nll_weight: weight of cpo's −log q of the chosen text; 0 where `NextToken` is an objective too.

    Source: DPKD, https://arxiv.org/abs/2406.19774, with length normalisation, the form it reports; variants in
    `lit_distill.functional.preference`.
    """

    def __init__(
        self,
        weight: float = 1.0,
        beta: float = 0.1,
        variant: PreferenceVariant = "dpkd",
        length_normalize: bool = True,
        label_smoothing: float = 0.0,
        target_margin: float = 0.5,
        dpop_lambda: float = 50.0,
        cpo_nll_weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        self.variant = variant
        self.beta = beta
        self.length_normalize = length_normalize
        self.others: dict[str, float] = {
            "label_smoothing": label_smoothing,
            "target_margin": target_margin,
            "dpop_lambda": dpop_lambda,
            "cpo_nll_weight": cpo_nll_weight,
        }
        self(*torch.zeros(4, 1, 1), *torch.ones(2, 1, 1))  # let the function itself judge the settings

    @property
    def needs(self) -> frozenset[str]:
        """What `forward` takes, without the teacher where the variant does not ask it."""
        return super().needs - (TEACHER_OF_PAIRS if self.variant in WITHOUT_TEACHER else frozenset())

    def forward(
        self,
        student_chosen_logprobs: Tensor,
        student_rejected_logprobs: Tensor,
        chosen_mask: Tensor,
        rejected_mask: Tensor,
        teacher_chosen_logprobs: Tensor | None = None,
        teacher_rejected_logprobs: Tensor | None = None,
    ) -> LossTerm:
        """Per-pair loss.

        Logs the implicit rewards of both texts, their margin, how often it is positive (``accuracy``), and log q per token.
        """
        student = (student_chosen_logprobs.sum(dim=-1), student_rejected_logprobs.sum(dim=-1))
        given = (teacher_chosen_logprobs, teacher_rejected_logprobs)
        teacher = [torch.zeros_like(q) if p is None else p.sum(dim=-1) for q, p in zip(student, given, strict=True)]
        lengths = (chosen_mask.sum(dim=-1), rejected_mask.sum(dim=-1))
        losses = direct_preference_loss(
            student[0],
            student[1],
            teacher[0],
            teacher[1],
            lengths[0],
            lengths[1],
            beta=self.beta,
            variant=self.variant,
            length_normalize=self.length_normalize,
            **self.others,
        )
        chosen, rejected = (
            implicit_reward(q, p, n, self.beta, self.length_normalize)
            for q, p, n in zip(student, teacher, lengths, strict=True)
        )
        return LossTerm(
            losses.sum(),
            len(losses),
            {
                "reward_chosen": chosen.sum(),
                "reward_rejected": rejected.sum(),
                "margin": (chosen - rejected).sum(),
                "accuracy": (chosen > rejected).float().sum(),
                "chosen_logprob": (student[0].detach() / lengths[0]).sum(),
                "rejected_logprob": (student[1].detach() / lengths[1]).sum(),
            },
        )


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
