"""Objectives of on-policy distillation, for the student's own text: fewer tokens, other targets, and a term that stays close.

They are computed on any text. Which of them needs the student's own, its docstring says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lit_distill.functional import (
    TopKSupport,
    entropy_gate,
    entropy_gated_kl,
    extrapolated_reverse_kl,
    reverse_kl,
    sampled_reverse_kl,
    top_k_forward_kl,
    top_k_overlap,
    top_k_reverse_kl,
)
from lit_distill.objectives.base import LossTerm, sum_over_tokens
from lit_distill.objectives.divergences import Divergence, ImportanceWeighted

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lit_distill.objectives.signals import Accuracy


class _TopK(Divergence):
    def __init__(
        self, weight: float = 1.0, temperature: float = 1.0, top_k: int = 32, support: TopKSupport = "teacher"
    ) -> None:
        super().__init__(weight, temperature)
        self.top_k = top_k
        self.support = support
        self.check_settings()

    @property
    def teacher_tokens(self) -> int:
        """The support, if it is the teacher's."""
        return self.top_k if self.support == "teacher" else 0

    def _term(self, divergence: Callable[..., Tensor], student_logits: Tensor, teacher_logits: Tensor) -> LossTerm:
        size = min(self.top_k, student_logits.shape[-1])
        given = (student_logits, teacher_logits, size, self.support, self.temperature)
        return sum_over_tokens(divergence(*given), **top_k_overlap(*given)._asdict())


class TopKForwardKL(_TopK):
    """KL(teacher ‖ student) over the k most probable tokens of one model, with both distributions renormalised over them.

    Biased: the student's probability of other tokens does not count. Watch ``student_mass``, its probability of the k tokens.

    Args:
        weight: factor in the loss.
        temperature: divides both models' logits, > 0.
        top_k: number of tokens, >= 2; all tokens of a smaller vocabulary.
        support: the model whose most probable tokens count.

    Source: Revisiting OPD, https://arxiv.org/abs/2603.25562, in the other direction.
    """

    @property
    def accepts_teacher(self) -> frozenset[Accuracy]:
        """It is finite where the teacher has probability 0."""
        return super().accepts_teacher | {"truncated"}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> LossTerm:
        """Per-token KL(p ‖ q) on the support.

        Logs both models' probability of it (``student_mass``, ``teacher_mass``), and the share of the k tokens that are among the k
        most probable of both (``overlap``).
        """
        return self._term(top_k_forward_kl, student_logits, teacher_logits)


class TopKReverseKL(_TopK):
    """KL(student ‖ teacher) over the k most probable tokens of one model, with both distributions renormalised over them.

    Biased: the student's probability of other tokens does not count. Watch ``student_mass``, its probability of the k tokens.

    Args:
        weight: factor in the loss.
        temperature: divides both models' logits, > 0.
        top_k: number of tokens, >= 2; all tokens of a smaller vocabulary.
        support: the model whose most probable tokens count.

    Source: Revisiting OPD, https://arxiv.org/abs/2603.25562; why renormalised: https://arxiv.org/abs/2605.11182.
    """

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> LossTerm:
        """Per-token KL(q ‖ p) on the support.

        Logs both models' probability of it (``student_mass``, ``teacher_mass``), and the share of the k tokens that are among the k
        most probable of both (``overlap``).
        """
        return self._term(top_k_reverse_kl, student_logits, teacher_logits)


class EntropyGatedKL(Divergence):
    """Forward KL at tokens where the teacher's entropy is high, reverse KL at the others.

    Args:
        weight: factor in the loss.
        temperature: divides both models' logits, > 0; the entropy is that at this temperature.
        threshold: entropy of the teacher, in nats, above which forward KL counts.
        width: of the change from one to the other, in nats, >= 0; 0 is a step, more a sigmoid.

    Source: EOPD, https://arxiv.org/abs/2603.07079; the weight is ours, see `lit_distill.functional.entropy_gated_kl`.
    """

    def __init__(
        self, weight: float = 1.0, temperature: float = 1.0, threshold: float = 1.0, width: float = 0.0
    ) -> None:
        super().__init__(weight, temperature)
        self.threshold = threshold
        self.width = width
        self.check_settings()

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> LossTerm:
        """Per-token mix of both KLs; logs the mean weight of forward KL (``forward_share``)."""
        settings = (self.threshold, self.width, self.temperature)
        return sum_over_tokens(
            entropy_gated_kl(student_logits, teacher_logits, *settings),
            forward_share=entropy_gate(teacher_logits, *settings),
        )


class ExtrapolatedReverseKL(ImportanceWeighted):
    """KL(q ‖ p^λ ref^(1−λ)/Z): reverse KL to a target that lies beyond the teacher p, as seen from the reference.

    Args:
        weight: factor in the loss.
        temperature: divides the logits of all three models, > 0.
        scale: λ, > 0. Above 1 it goes beyond the teacher; 1 is `ReverseKL`; 1/(1+b) pulls towards the reference as `ReverseKL` with
            a `ReferenceKL` of weight b does.
        importance_weighted: as MiniLLM's Single term: multiply each token by the importance weight that corrects for the teacher's
            share in the sampler.

    Source: G-OPD, https://arxiv.org/abs/2602.12125, which uses 1.25 and found 1.5 unstable.
    """

    def __init__(
        self, weight: float = 1.0, temperature: float = 1.0, scale: float = 1.25, importance_weighted: bool = False
    ) -> None:
        super().__init__(weight, temperature, importance_weighted)
        self.scale = scale
        self(*torch.zeros(3, 1, 2))  # the function rejects invalid settings

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        reference_logits: Tensor,
        single_step_weights: Tensor | None = None,
    ) -> LossTerm:
        """Per-token KL to the extrapolated target, importance-weighted if configured."""
        given = student_logits, teacher_logits, reference_logits
        values = extrapolated_reverse_kl(*given, self.scale, self.temperature)
        return self.weighted_sum(values, single_step_weights)


class SampledReverseKL(Divergence):
    """Reverse KL by policy gradient on the token of the text alone: (log q(y) − log p(y) − b) ∇log q(y).

    The value is log q(y) − log p(y). Both are unbiased only on text that the student has just sampled at this temperature, without
    top-k or top-p. `ReverseKL` has the same mean gradient there and no variance; this one shows what single tokens can do.

    Args:
        weight: factor in the loss.
        temperature: of the logits of both models, > 0; must be that of the rollouts.
        baseline: b = KL(q ‖ p), which usually lowers the variance; else b = 0.

    Source: vOPD, https://arxiv.org/abs/2605.07865.
    """

    valid_on_any_text = False

    def __init__(self, weight: float = 1.0, temperature: float = 1.0, baseline: bool = True) -> None:
        super().__init__(weight, temperature)
        self.baseline = baseline
        self(*torch.zeros(2, 1, 2), torch.zeros(1, dtype=torch.long))  # the function rejects invalid settings

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> LossTerm:
        """Per-token log q(y) − log p(y), with the gradient of the policy."""
        return sum_over_tokens(
            sampled_reverse_kl(student_logits, teacher_logits, labels, self.baseline, self.temperature)
        )


class ReferenceKL(Divergence):
    """KL(student ‖ reference): keeps the student close to a frozen model, such as itself before training.

    Add it to other objectives: alone it teaches nothing but the reference.

    Args:
        weight: factor in the loss.
        temperature: divides both models' logits, > 0.

    Source: StableOPD, https://arxiv.org/abs/2604.08527.
    """

    def forward(self, student_logits: Tensor, reference_logits: Tensor) -> LossTerm:
        """Per-token KL(q ‖ reference)."""
        return sum_over_tokens(reverse_kl(student_logits, reference_logits, self.temperature))
