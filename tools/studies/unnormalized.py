"""The form of top-k reverse KL that collapses, to be seen beside the corrected one; it is not a part of the library on purpose."""

from __future__ import annotations

from torch import Tensor

from lit_distill.objectives import LossTerm, Objective, sum_over_tokens


class UnnormalizedTopKReverseKL(Objective):
    """Σ q log(q/p) over the teacher's k most probable tokens, with q and p of the whole vocabulary.

    At q = p its gradient is that of the student's probability of these tokens, so they lose it.

    Args:
        weight: factor in the loss.
        top_k: number of tokens.

    Source: what is wrong with it: https://arxiv.org/abs/2605.11182.
    """

    def __init__(self, weight: float = 1.0, top_k: int = 16) -> None:
        super().__init__(weight)
        self.top_k = top_k

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> LossTerm:
        """Per-token sum; logs the student's probability of the k tokens."""
        log_q, log_p = student_logits.log_softmax(dim=-1), teacher_logits.log_softmax(dim=-1)
        top = teacher_logits.topk(self.top_k).indices
        q, p = log_q.gather(-1, top), log_p.gather(-1, top)
        return sum_over_tokens((q.exp() * (q - p)).sum(dim=-1), student_mass=q.exp().sum(dim=-1))
