"""Token-level divergences between student and teacher, and plain cross-entropy.

Each class holds the settings and calls a function of `lit_distill.functional`. The loss is not multiplied by the square of the
temperature; if a recipe does that (Hinton et al. 2015, section 2.1: T²), set `weight` accordingly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lit_distill.functional import adaptive_kl, divergences
from lit_distill.objectives.base import LossTerm, Objective, sum_over_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from lit_distill.objectives.signals import Accuracy


class NextToken(Objective):
    """Cross-entropy of the student on the text itself: supervised fine-tuning, SeqKD and the pre-training loss.

    Args:
        weight: factor in the loss.
        label_smoothing: probability mass spread evenly over the vocabulary, in [0, 1).
    """

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(weight)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}.")
        self.label_smoothing = label_smoothing

    def forward(self, student_logits: Tensor, labels: Tensor) -> LossTerm:
        """Per-token −log q(label)."""
        return sum_over_tokens(
            F.cross_entropy(student_logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        )


class Divergence(Objective):
    """A divergence between the two next-token distributions at one temperature.

    Args:
        weight: factor in the loss.
        temperature: divides both models' logits, > 0.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(weight)
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number > 0 for {type(self).__name__}, got {temperature}.")
        self.temperature = temperature

    def check_settings(self) -> None:
        """Call the function once, so that it rejects invalid settings now and not at the first batch."""
        self(torch.zeros(1, 2), torch.zeros(1, 2))


class ForwardKL(Divergence):
    """KL(teacher ‖ student): the student covers every token that the teacher finds probable. Hinton et al. 2015."""

    @property
    def accepts_teacher(self) -> frozenset[Accuracy]:
        """Its gradient is q − p: linear in the teacher's probabilities at temperature 1, and finite where they are 0."""
        if self.temperature == 1:
            return super().accepts_teacher | {"truncated", "drawn"}
        return super().accepts_teacher | {"truncated"}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> LossTerm:
        """Per-token KL(p ‖ q)."""
        return sum_over_tokens(divergences.forward_kl(student_logits, teacher_logits, self.temperature))


class ImportanceWeighted(Divergence):
    """A divergence that may serve as MiniLLM's Single term on rollouts of a mixture.

    Args:
        weight: factor in the loss.
        temperature: divides the models' logits, > 0.
        importance_weighted: multiply each token by the importance weight that corrects for the teacher's share in the sampler.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 1.0, importance_weighted: bool = False) -> None:
        super().__init__(weight, temperature)
        self.importance_weighted = importance_weighted

    @property
    def needs(self) -> frozenset[str]:
        """The signals of ``forward``, and the importance weights only if they are used."""
        return super().needs if self.importance_weighted else super().needs - {"single_step_weights"}

    @staticmethod
    def weighted_sum(values: Tensor, weights: Tensor | None) -> LossTerm:
        """The sum of ``values`` ``[N]`` times ``weights`` ``[N]``; logs the mean without weights, if there are some."""
        return sum_over_tokens(values) if weights is None else sum_over_tokens(values * weights, unweighted=values)


class ReverseKL(ImportanceWeighted):
    """KL(student ‖ teacher): the student avoids tokens that the teacher finds improbable. On rollouts: MiniLLM's Single term.

    Args:
        weight: factor in the loss.
        temperature: divides both models' logits, > 0.
        importance_weighted: multiply each token by the importance weight that corrects for the teacher's share in the sampler
            (paper: yes, reference code: no).
    """

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, single_step_weights: Tensor | None = None
    ) -> LossTerm:
        """Per-token KL(q ‖ p), importance-weighted if configured."""
        values = divergences.reverse_kl(student_logits, teacher_logits, self.temperature)
        return self.weighted_sum(values, single_step_weights)


class JensenShannon(Divergence):
    """GKD's generalised Jensen–Shannon divergence, β KL(p ‖ m) + (1−β) KL(q ‖ m) with m = βp + (1−β)q.

    Args:
        weight: factor in the loss.
        temperature: divides both models' logits, > 0.
        beta: weight of the teacher in the mixture, in (0, 1).
    """

    def __init__(self, weight: float = 1.0, temperature: float = 1.0, beta: float = 0.5) -> None:
        super().__init__(weight, temperature)
        self.beta = beta
        self.check_settings()

    @property
    def accepts_teacher(self) -> frozenset[Accuracy]:
        """It is finite where the teacher has probability 0."""
        return super().accepts_teacher | {"truncated"}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> LossTerm:
        """Per-token JSD."""
        return sum_over_tokens(
            divergences.jensen_shannon(student_logits, teacher_logits, self.beta, temperature=self.temperature)
        )


class _Skewed(Divergence):
    def __init__(self, weight: float = 1.0, temperature: float = 1.0, skew: float = 0.1) -> None:
        super().__init__(weight, temperature)
        self.skew = skew
        self.check_settings()


class SkewForwardKL(_Skewed):
    """DistiLLM's KL(p ‖ αp + (1−α)q), bounded by −log α.

    Args:
        weight: factor in the loss.
        temperature: divides both models' logits, > 0.
        skew: α, the share of the teacher in the mixture, in (0, 1).
    """

    @property
    def accepts_teacher(self) -> frozenset[Accuracy]:
        """It is finite where the teacher has probability 0."""
        return super().accepts_teacher | {"truncated"}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> LossTerm:
        """Per-token skew KL."""
        return sum_over_tokens(
            divergences.skew_forward_kl(student_logits, teacher_logits, self.skew, temperature=self.temperature)
        )


class SkewReverseKL(_Skewed):
    """DistiLLM's KL(q ‖ (1−α)p + αq), bounded by −log α.

    Args:
        weight: factor in the loss.
        temperature: divides both models' logits, > 0.
        skew: α, the share of the student in the mixture, in (0, 1).
    """

    @property
    def accepts_teacher(self) -> frozenset[Accuracy]:
        """It is finite where the teacher has probability 0."""
        return super().accepts_teacher | {"truncated"}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> LossTerm:
        """Per-token skew reverse KL."""
        return sum_over_tokens(
            divergences.skew_reverse_kl(student_logits, teacher_logits, self.skew, temperature=self.temperature)
        )


class TotalVariation(Divergence):
    """Half the L1 distance between the two distributions, in [0, 1]."""

    @property
    def accepts_teacher(self) -> frozenset[Accuracy]:
        """It is finite where the teacher has probability 0."""
        return super().accepts_teacher | {"truncated"}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> LossTerm:
        """Per-token total variation."""
        return sum_over_tokens(divergences.total_variation(student_logits, teacher_logits, self.temperature))


class AdaptiveKL(Divergence):
    """AKL: forward and reverse KL, weighted by how much student and teacher differ in the teacher's head and tail tokens.

    Args:
        weight: factor in the loss.
        temperature: divides both models' logits, > 0.
        head_mass: the head is the smallest set of tokens with this much of the teacher's probability, in (0, 1).

    Source: Wu et al. 2024, https://arxiv.org/abs/2404.02657.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 1.0, head_mass: float = 0.5) -> None:
        super().__init__(weight, temperature)
        self.head_mass = head_mass
        self.check_settings()

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> LossTerm:
        """Per-token adaptive KL."""
        return sum_over_tokens(
            adaptive_kl(student_logits, teacher_logits, self.head_mass, temperature=self.temperature)
        )
