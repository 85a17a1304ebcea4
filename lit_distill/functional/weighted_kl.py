r"""Mixtures of both KL divergences whose weight depends on the position.

The rules of `lit_distill.functional.divergences` hold here too.

| function | formula | source |
|---|---|---|
| `adaptive_kl` | w KL(p‖q) + (1−w) KL(q‖p), w from the gap in the teacher's head | AKL, arXiv 2404.02657 |
| `entropy_gated_kl` | w KL(p‖q) + (1−w) KL(q‖p), w from the entropy of p | EOPD, arXiv 2603.07079; w is ours |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_distill.functional.closed_form import Distribution, evaluate, mass_where_impossible
from lit_distill.functional.distributions import entropy
from lit_distill.functional.divergences import TINY

HEAD_TOKENS = 128
"""Tokens of a row that `adaptive_kl` sorts first; a trained teacher's head is smaller."""


def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, head_mass: float = 0.5, temperature: float = 1.0
) -> Tensor:
    r"""Per-token mix of forward and reverse KL, weighted by where student and teacher disagree.

    The head is the smallest set of tokens that holds teacher mass >= head_mass, the tail is the rest. Forward KL is
    weighted by the share of sum(abs(p - q)) that lies in the head, reverse KL by the share in the tail. The weights are
    constants.

    Args:
        student_logits: ``[..., V]`` scores of the student; receives the gradient.
        teacher_logits: ``[..., V]`` scores of the teacher; treated as constant.
        head_mass: teacher probability that makes up the head, 0 < head_mass < 1.
        temperature: divides both, > 0.

    Returns:
        ``[...]`` float32, nats, >= 0; 0 at p = q, where the weights are 0/0. On a GPU, and for a flat teacher,
        it costs a sort of the vocabulary.

    Raises:
        ValueError: if head_mass is not inside (0, 1), the shapes differ or the temperature is not > 0.

    Source: AKL, https://arxiv.org/abs/2404.02657.
    """
    if not 0 < head_mass < 1:
        raise ValueError(f"head_mass: expected a probability inside (0, 1), got {head_mass}.")
    return evaluate(_adaptive_kl, student_logits, teacher_logits, temperature, head_mass)


def _adaptive_kl(q: Distribution, p: Distribution, head_mass: float) -> tuple[Tensor, Tensor]:
    return _weighted_kls(q, p, _share_of_gap_in_head(p.probs, q.probs, head_mass))


def entropy_gated_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    threshold: float = 1.0,
    width: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    r"""Per-token forward KL where the teacher is uncertain, so that the student covers all it may say; reverse KL elsewhere.

    w KL(p‖q) + (1−w) KL(q‖p) with the w of `entropy_gate`, a constant of the teacher alone. The paper adds forward KL to reverse
    KL where the teacher's entropy is high; that w replaces one by the other, and its soft form, are ours. The mix is 0 at p = q
    alone, like both. Where the student cannot reach p, its minimum is that of neither.

    Args:
        student_logits: ``[..., V]`` scores of the student; receives the gradient.
        teacher_logits: ``[..., V]`` scores of the teacher; treated as constant.
        threshold: entropy of the teacher in nats, finite.
        width: of the change from one to the other, in nats, >= 0.
        temperature: divides both, > 0, also for the entropy.

    Returns:
        ``[...]`` float32, nats, >= 0; +inf where the divergence of the position is.

    Raises:
        ValueError: if the threshold is not finite, the width is not >= 0, the shapes differ or the temperature is not > 0.

    Source: EOPD, https://arxiv.org/abs/2603.07079.
    """
    _check_gate(threshold, width)
    return evaluate(_entropy_gated_kl, student_logits, teacher_logits, temperature, threshold, width)


def _entropy_gated_kl(q: Distribution, p: Distribution, threshold: float, width: float) -> tuple[Tensor, Tensor]:
    return _weighted_kls(q, p, _gate(-(p.probs * p.logprobs).sum(-1), threshold, width))


@torch.no_grad()
def entropy_gate(
    teacher_logits: Tensor, threshold: float = 1.0, width: float = 0.0, temperature: float = 1.0
) -> Tensor:
    r"""The share w of forward KL in `entropy_gated_kl`, from the teacher's entropy H.

    Args:
        teacher_logits: ``[..., V]`` scores of the teacher.
        threshold: entropy in nats, finite.
        width: 0: w is 1 if H > threshold, else 0. More than 0: w = σ((H − threshold)/width).
        temperature: divides the scores, > 0.

    Returns:
        ``[...]`` float32 in [0, 1], without gradient.

    Raises:
        ValueError: if the threshold is not finite, the width is not >= 0 or the temperature is not > 0.
    """
    _check_gate(threshold, width)
    return _gate(entropy(teacher_logits, temperature), threshold, width)


def _weighted_kls(q: Distribution, p: Distribution, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative of w KL(p‖q) + (1−w) KL(q‖p) with a constant w ``[n]``."""
    forward_gap, reverse_gap = mass_where_impossible(p, q), mass_where_impossible(q, p)
    infinite = torch.where(weight > 0, forward_gap, 0.0) + torch.where(weight < 1, reverse_gap, 0.0)
    log_ratio = q.logprobs.sub_(p.logprobs)
    forward = p.probs.mul_(weight.unsqueeze(-1))
    reverse = torch.mul(q.probs, 1 - weight.unsqueeze(-1), out=p.logprobs)
    reverse_terms = reverse.mul_(log_ratio)
    value = (reverse_terms - forward * log_ratio).sum(-1) + infinite
    return value, reverse_terms.sub_(forward)


def _gate(teacher_entropy: Tensor, threshold: float, width: float) -> Tensor:
    if width == 0:
        return (teacher_entropy > threshold).float()
    return torch.sigmoid((teacher_entropy - threshold) / width)


def _share_of_gap_in_head(p: Tensor, q: Tensor, head_mass: float) -> Tensor:
    """[n]: share of sum(abs(p - q)) on the smallest set of tokens with ``head_mass`` of p; 0 for p = q."""
    total = torch.sub(p, q).abs_().sum(-1).clamp_(min=TINY)
    if p.device.type != "cpu" or p.shape[-1] <= HEAD_TOKENS:  # a GPU would have to be waited for
        return _gap_in_head(*p.sort(dim=-1, descending=True, stable=True), q, head_mass) / total
    largest, order = p.topk(HEAD_TOKENS)
    gap = _gap_in_head(largest[:, :-1], order[:, :-1], q, head_mass)
    # these rows need more tokens, or the head ends between equal tokens, of which `topk` takes any
    size = (_mass_before(largest) < head_mass).sum(-1, keepdim=True)
    last, following = largest.gather(-1, size - 1), largest.gather(-1, size.clamp(max=HEAD_TOKENS - 1))
    rest = ((size == HEAD_TOKENS) | (last == following)).squeeze(-1).nonzero().squeeze(-1)
    if len(rest):
        gap[rest] = _gap_in_head(*p[rest].sort(dim=-1, descending=True, stable=True), q[rest], head_mass)
    return gap / total


def _gap_in_head(sorted_p: Tensor, order: Tensor, q: Tensor, head_mass: float) -> Tensor:
    return (sorted_p - q.gather(-1, order)).abs_().mul_(_mass_before(sorted_p) < head_mass).sum(-1)


def _mass_before(sorted_p: Tensor) -> Tensor:
    """The mass of the tokens before each: the token that crosses ``head_mass`` is in the head."""
    return sorted_p.cumsum(-1).sub_(sorted_p)


def _check_gate(threshold: float, width: float) -> None:
    if not math.isfinite(threshold):
        raise ValueError(f"threshold: expected a finite entropy in nats, got {threshold}.")
    if not 0 <= width < math.inf:
        raise ValueError(f"width: expected a finite number of nats >= 0, got {width}.")
