r"""KL divergences on the k most probable tokens S of one model, with both distributions renormalised over S.

| | Revisiting OPD (paper) | here |
|---|---|---|
| S | the teacher's top 32 | `support`: the teacher's or the student's; a constant |
| direction | reverse KL | `top_k_reverse_kl`, `top_k_forward_kl` |
| normaliser | over S | over S: the softmax of the logits of S |

Why it is renormalised: Σ_S q log(q/p) with full-vocabulary q and p has the gradient Σ_S ∇q at p = q. That is not zero, so a
student equal to its teacher is pushed to take probability from S. Over S the probabilities add up to 1, and this term vanishes.

Biased: what lies outside S is invisible. The student may give S any probability in total, and spread the rest over the other
tokens in any way. Watch the masses of `top_k_overlap`.

Sources: Revisiting OPD, https://arxiv.org/abs/2603.25562; renormalisation: Many Faces of OPD, https://arxiv.org/abs/2605.11182.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_distill.functional.distributions import (
    IMPOSSIBLE,
    check_same_vocabulary,
    check_temperature,
    tempered_log_softmax,
)
from lit_distill.functional.divergences import forward_kl, reverse_kl

TopKSupport = Literal["teacher", "student"]


class TopKOverlap(NamedTuple):
    """How much of two next-token distributions the k most probable tokens hold, one number per position."""

    overlap: Tensor
    """``[...]``: share of the k tokens that are among the k most probable of both models, in [0, 1]."""
    student_mass: Tensor
    """``[...]``: the student's probability of the support, in [0, 1]."""
    teacher_mass: Tensor
    """``[...]``: the teacher's probability of the support, in [0, 1]."""


def top_k_forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    top_k: int = 32,
    support: TopKSupport = "teacher",
    temperature: float = 1.0,
) -> Tensor:
    r"""Per-token KL(p_S ‖ q_S) over the k most probable tokens S of one model; both are renormalised over S.

    Biased as an estimate of KL(p ‖ q): probability outside S does not count and gets no gradient.

    Args:
        student_logits: ``[..., V]`` scores of the student; receives the gradient, on S alone.
        teacher_logits: ``[..., V]`` scores of the teacher; treated as constant.
        top_k: number of tokens in S, 2 to V. With V it is `forward_kl`.
        support: the model whose most probable tokens are S. Among equal tokens any may be taken.
        temperature: divides both, > 0; it does not change S.

    Returns:
        ``[...]`` float32, nats, >= 0; +inf where a token of p_S is impossible for the student. It is 0, without gradient, where
        every token of S is impossible for the other model: that model has no distribution over S.

    Raises:
        ValueError: if top_k is not in [2, V], the support is unknown, the shapes differ or the temperature is not > 0.

    Source: Revisiting OPD, https://arxiv.org/abs/2603.25562, in the other direction.
    """
    return forward_kl(*_on_support(student_logits, teacher_logits, top_k, support, temperature), temperature)


def top_k_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    top_k: int = 32,
    support: TopKSupport = "teacher",
    temperature: float = 1.0,
) -> Tensor:
    r"""Per-token KL(q_S ‖ p_S) over the k most probable tokens S of one model; both are renormalised over S.

    Biased as an estimate of KL(q ‖ p): probability outside S does not count and gets no gradient.

    Args:
        student_logits: ``[..., V]`` scores of the student; receives the gradient, on S alone.
        teacher_logits: ``[..., V]`` scores of the teacher; treated as constant.
        top_k: number of tokens in S, 2 to V. With V it is `reverse_kl`.
        support: the model whose most probable tokens are S. Among equal tokens any may be taken.
        temperature: divides both, > 0; it does not change S.

    Returns:
        ``[...]`` float32, nats, >= 0; +inf where a token of q_S is impossible for the teacher. It is 0, without gradient, where
        every token of S is impossible for the other model: that model has no distribution over S.

    Raises:
        ValueError: if top_k is not in [2, V], the support is unknown, the shapes differ or the temperature is not > 0.

    Source: Revisiting OPD, https://arxiv.org/abs/2603.25562.
    """
    return reverse_kl(*_on_support(student_logits, teacher_logits, top_k, support, temperature), temperature)


@torch.no_grad()
def top_k_overlap(
    student_logits: Tensor,
    teacher_logits: Tensor,
    top_k: int = 32,
    support: TopKSupport = "teacher",
    temperature: float = 1.0,
) -> TopKOverlap:
    r"""What `top_k_forward_kl` and `top_k_reverse_kl` see: the common tokens of both supports, and both masses on the support.

    Args:
        student_logits: ``[..., V]`` scores of the student.
        teacher_logits: ``[..., V]`` scores of the teacher.
        top_k: number of tokens, 2 to V.
        support: the model whose most probable tokens hold the masses.
        temperature: divides both for the masses, > 0.

    Returns:
        Three times ``[...]`` float32, without gradient.

    Raises:
        ValueError: as for `top_k_reverse_kl`.

    Source: the overlap as a metric: Rethinking OPD, https://arxiv.org/abs/2604.13016.
    """
    _check(student_logits, teacher_logits, top_k, support, temperature)
    student_ids, teacher_ids = student_logits.topk(top_k).indices, teacher_logits.topk(top_k).indices
    ids = student_ids if support == "student" else teacher_ids
    student_mass, teacher_mass = (
        tempered_log_softmax(logits, temperature).gather(-1, ids).exp().sum(-1)
        for logits in (student_logits, teacher_logits)
    )
    return TopKOverlap(common_share(student_ids, teacher_ids), student_mass, teacher_mass)


def common_share(some: Tensor, others: Tensor) -> Tensor:
    """``[...]``: the share of distinct ids ``[..., k]`` that are among other ones ``[..., k]``."""
    return (some.unsqueeze(-1) == others.unsqueeze(-2)).any(-1).float().mean(-1)


def _on_support(
    student_logits: Tensor, teacher_logits: Tensor, top_k: int, support: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Both models' logits ``[..., k]`` of the support; all 0 where one of them finds every token there impossible."""
    _check(student_logits, teacher_logits, top_k, support, temperature)
    both = student_logits, teacher_logits.detach()
    with torch.no_grad():
        ids = both[support == "teacher"].topk(top_k).indices
        # The softmax of -inf alone is NaN. The largest logit stands for the normaliser: they differ by at most log V.
        below = torch.stack([logits.gather(-1, ids).amax(-1).float() - logits.amax(-1).float() for logits in both])
        nothing = (below / temperature <= IMPOSSIBLE).any(0).unsqueeze(-1)
    student, teacher = (logits.gather(-1, ids).masked_fill(nothing, 0.0) for logits in both)
    return student, teacher


def _check(student_logits: Tensor, teacher_logits: Tensor, top_k: int, support: str, temperature: float) -> None:
    check_temperature(temperature)
    check_same_vocabulary(student_logits, teacher_logits)
    if support not in get_args(TopKSupport):
        raise ValueError(f"support: expected one of {', '.join(get_args(TopKSupport))}, got {support!r}.")
    if top_k < 2:
        raise ValueError(
            f"top_k: expected 2 or more, got {top_k}. Renormalised over one token, its probability is always 1."
        )
    if top_k > student_logits.shape[-1]:
        raise ValueError(
            f"top_k: expected at most the {student_logits.shape[-1]} tokens of the vocabulary, got {top_k}. Lower it, or use the "
            "divergence of the full vocabulary."
        )
