"""Preference losses of DPKD: between whole responses, as in the paper, or between tokens, as in its released code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from lit_distill.functional import PreferenceVariant, direct_preference_loss, implicit_reward, token_preference_loss
from lit_distill.functional.preference import WITHOUT_TEACHER
from lit_distill.objectives.base import LossTerm, Objective, sum_over_tokens
from lit_distill.objectives.signals import TEACHER_OF_PAIRS

if TYPE_CHECKING:
    from torch import Tensor


class DirectPreference(Objective):
    """DPKD: prefer the teacher's (or the dataset's) response over the student's own, on pairs from `ResponsePairs`.

    Its mean gradient is 0 if student and teacher agree. It can lower the log-probability of the rejected response without bound:
    watch ``rejected_logprob``, and add `NextToken` (on the chosen response) and the corpus loss.

    Args:
        weight: factor in the loss.
        beta: preference temperature, > 0.
        variant: dpkd, ipo, cpo, simpo, dpop, reference_free or teacher_margin; cpo, simpo and reference_free do not use
            the teacher.
        length_normalize: divide every log-probability by the length of its response.
        label_smoothing: probability in [0, 0.5] that the preference is the other way round.
        target_margin: SimPO's γ, in units of reward.
        dpop_lambda: weight of dpop's penalty if the student gives the chosen response less probability than the teacher does.
        cpo_nll_weight: weight of cpo's −log q of the chosen response; set 0 if `NextToken` is an objective too.
        teacher_margin: α of variant teacher_margin, >= 0: factor of the margin, which is the teacher's log-ratio of the chosen to
            the rejected response, or 0 if the teacher prefers the rejected one. Equal to beta it is dpkd with that limit.

    Source: DPKD, https://arxiv.org/abs/2406.19774, with the length normalisation that it reports; variants in
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
        teacher_margin: float = 0.1,
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
            "teacher_margin": teacher_margin,
        }
        self(*torch.zeros(4, 1, 1), *torch.ones(2, 1, 1))  # the function rejects invalid settings

    @property
    def needs(self) -> frozenset[str]:
        """The arguments of `forward`, without the teacher's if the variant does not use them."""
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

        Logs the implicit rewards of both responses, their margin, how often it is positive (``accuracy``), and log q per token.
        With teacher_margin the rewards are β log q, as without a teacher: it compares these with a margin.
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
        reference = [torch.zeros_like(p) for p in teacher] if self.variant == "teacher_margin" else teacher
        chosen, rejected = (
            implicit_reward(q, p, n, self.beta, self.length_normalize)
            for q, p, n in zip(student, reference, lengths, strict=True)
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

    Nothing is generated. The value is at least log 2 (``dpkd``); the gradient is 0 where both models have the same top token.

    Args:
        weight: factor in the loss.
        beta: preference temperature, > 0.
        variant: dpkd, ipo, dpop or reference_free. The released code's simpo needs the length of the whole response, which
            is not available per token here; it is in `lit_distill.functional.token_preference_loss`.
        label_smoothing: probability in [0, 0.5] that the preference is the other way round.
        dpop_lambda: weight of dpop's penalty if the student gives the teacher's token less probability than the teacher does.

    Source: microsoft/LMOps, dpkd; the paper describes another method, on whole responses.
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
        self(torch.zeros(1, 2), torch.zeros(1, 2))  # the function rejects invalid settings

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> LossTerm:
        """Per-token preference loss; logs how often both models have the same top token (``agreement``)."""
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
