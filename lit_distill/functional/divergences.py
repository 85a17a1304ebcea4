r"""Full-vocabulary divergences between a student q and a teacher p, one number per position.

All share one signature, ``(student_logits [..., V], teacher_logits [..., V], temperature=1.0) -> [...]``, and these
rules:

- nats, float32 inside and out for any input dtype, also under autocast; never multiplied by the squared temperature;
- the teacher is a constant: no gradient reaches ``teacher_logits``;
- a logit of -inf (or any log-probability below -10,000) is an impossible token. Impossible for both: it contributes
  exactly 0 and gets no gradient. Impossible for one: the value is what theory says, +inf where the divergence is
  unbounded (forward KL and soft cross-entropy if the token is impossible for the student only, reverse KL if it is
  impossible for the teacher only); the gradient uses -10,000 for log 0, so it is finite and points away from the gap;
- p = q gives 0 with zero gradient, up to rounding: a sum of signed terms may end a few float32 ulps below 0.

Every gradient is computed in closed form together with the value, from the derivative by log q; a single ``[..., V]`` is stored
for the backward pass. The functions are differentiable once.
Mixtures whose weight depends on the position are in `lit_distill.functional.weighted_kl`.

| function | formula | source |
|---|---|---|
| `forward_kl` | KL(p‖q) | Hinton et al. 2015, arXiv 1503.02531 |
| `reverse_kl` | KL(q‖p) | MiniLLM, arXiv 2306.08543; the Single term is this per position |
| `jensen_shannon` | β KL(p‖m) + (1−β) KL(q‖m), m = βp + (1−β)q | GKD, arXiv 2306.13649 |
| `skew_forward_kl` | KL(p‖αp + (1−α)q) | DistiLLM, arXiv 2402.03898 |
| `skew_reverse_kl` | KL(q‖(1−α)p + αq) | DistiLLM, arXiv 2402.03898 |
| `total_variation` | ½ Σ abs(p − q) | f-distill, arXiv 2307.15190 |
| `soft_cross_entropy` | −Σ p log q = KL(p‖q) + entropy of p | Hinton et al. 2015 |
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_distill.functional.closed_form import Distribution, evaluate, mass_where_impossible

TINY = torch.finfo(torch.float32).tiny


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Per-token KL(teacher || student): punishes the student for giving low probability to the teacher's tokens.

    Args:
        student_logits: ``[..., V]`` scores of the student; receives the gradient.
        teacher_logits: ``[..., V]`` scores of the teacher; treated as constant.
        temperature: divides both, > 0. The result is not multiplied by its square.

    Returns:
        ``[...]`` float32, nats, >= 0; +inf where a token of the teacher is impossible for the student.

    Raises:
        ValueError: if the shapes differ, as with vocabularies padded to different sizes, or the temperature is not > 0.

    Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2.
    """
    return evaluate(_forward_kl, student_logits, teacher_logits, temperature)


def _forward_kl(q: Distribution, p: Distribution) -> tuple[Tensor, Tensor]:
    infinite = mass_where_impossible(p, q)
    value = p.logprobs.sub_(q.logprobs).mul_(p.probs).sum(-1) + infinite
    return value, p.probs.neg_()


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Per-token KL(student || teacher): punishes the student for tokens that the teacher finds improbable.

    Over prefixes sampled from the student its mean gradient is MiniLLM's Single term.

    Args:
        student_logits: ``[..., V]`` scores of the student; receives the gradient.
        teacher_logits: ``[..., V]`` scores of the teacher; treated as constant.
        temperature: divides both, > 0.

    Returns:
        ``[...]`` float32, nats, >= 0; +inf where a token of the student is impossible for the teacher.

    Raises:
        ValueError: if the shapes differ, as with vocabularies padded to different sizes, or the temperature is not > 0.

    Source: MiniLLM, https://arxiv.org/abs/2306.08543.
    """
    return evaluate(_reverse_kl, student_logits, teacher_logits, temperature)


def _reverse_kl(q: Distribution, p: Distribution) -> tuple[Tensor, Tensor]:
    infinite = mass_where_impossible(q, p)
    terms = q.logprobs.sub_(p.logprobs).mul_(q.probs)
    return terms.sum(-1) + infinite, terms


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    r"""Per-token generalised Jensen-Shannon divergence: between forward KL (beta near 0) and reverse KL (beta near 1).

    Divided by beta it tends to forward KL as beta goes to 0; divided by 1 - beta to reverse KL as beta goes to 1.

    Args:
        student_logits: ``[..., V]`` scores of the student; receives the gradient.
        teacher_logits: ``[..., V]`` scores of the teacher; treated as constant.
        beta: weight of the teacher in the mixture, 0 < beta < 1.
        temperature: divides both, > 0.

    Returns:
        ``[...]`` float32, nats, between 0 and the entropy of (beta, 1 - beta), so at most log 2.

    Raises:
        ValueError: if beta is not inside (0, 1), the shapes differ or the temperature is not > 0.

    Source: GKD, https://arxiv.org/abs/2306.13649.
    """
    if beta in (0, 1):
        limit = "ForwardKL (function forward_kl)" if beta == 0 else "ReverseKL (function reverse_kl)"
        raise ValueError(
            f"beta: {beta} makes the Jensen-Shannon divergence 0 everywhere. Its limit is {limit}: use that."
        )
    if not 0 < beta < 1:
        raise ValueError(f"beta: expected the teacher's share of the mixture, inside (0, 1), got {beta}.")
    return evaluate(_jensen_shannon, student_logits, teacher_logits, temperature, beta)


def _jensen_shannon(q: Distribution, p: Distribution, beta: float) -> tuple[Tensor, Tensor]:
    log_m = _mixture(p, q, beta).log_()
    student_terms = q.logprobs.sub_(log_m).mul_(q.probs).mul_(1 - beta)
    teacher_terms = p.logprobs.sub_(log_m).mul_(p.probs)
    return beta * teacher_terms.sum(-1) + student_terms.sum(-1), student_terms


def skew_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, skew: float = 0.1, temperature: float = 1.0
) -> Tensor:
    r"""Per-token KL(teacher || skew * teacher + (1 - skew) * student): forward KL with a bounded value and gradient.

    Args:
        student_logits: ``[..., V]`` scores of the student; receives the gradient.
        teacher_logits: ``[..., V]`` scores of the teacher; treated as constant.
        skew: share of the teacher in the mixture, 0 < skew < 1.
        temperature: divides both, > 0.

    Returns:
        ``[...]`` float32, nats, between 0 and -log(skew).

    Raises:
        ValueError: if skew is not inside (0, 1), the shapes differ or the temperature is not > 0.

    Source: DistiLLM, https://arxiv.org/abs/2402.03898.
    """
    _check_skew(skew, "ForwardKL (function forward_kl)")
    return evaluate(_skew_forward_kl, student_logits, teacher_logits, temperature, skew)


def _skew_forward_kl(q: Distribution, p: Distribution, skew: float) -> tuple[Tensor, Tensor]:
    ratio = torch.div(p.probs, _mixture(p, q, skew), out=p.logprobs)
    log_ratio = torch.clamp(ratio, min=TINY, out=q.logprobs).log_()
    value = p.probs.mul_(log_ratio).sum(-1)
    return value, ratio.mul_(q.probs).mul_(skew - 1)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, skew: float = 0.1, temperature: float = 1.0
) -> Tensor:
    r"""Per-token KL(student || (1 - skew) * teacher + skew * student): reverse KL with a bounded value and gradient.

    Args:
        student_logits: ``[..., V]`` scores of the student; receives the gradient, through both of its places.
        teacher_logits: ``[..., V]`` scores of the teacher; treated as constant.
        skew: share of the student in the mixture, 0 < skew < 1.
        temperature: divides both, > 0.

    Returns:
        ``[...]`` float32, nats, between 0 and -log(skew).

    Raises:
        ValueError: if skew is not inside (0, 1), the shapes differ or the temperature is not > 0.

    Source: DistiLLM, https://arxiv.org/abs/2402.03898.
    """
    _check_skew(skew, "ReverseKL (function reverse_kl)")
    return evaluate(_skew_reverse_kl, student_logits, teacher_logits, temperature, skew)


def _skew_reverse_kl(q: Distribution, p: Distribution, skew: float) -> tuple[Tensor, Tensor]:
    ratio = torch.div(q.probs, _mixture(p, q, 1 - skew), out=p.logprobs)
    terms = torch.clamp(ratio, min=TINY, out=q.logprobs).log_().mul_(q.probs)
    value = terms.sum(-1)
    return value, terms.addcmul_(ratio, q.probs, value=-skew)


def total_variation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Per-token total variation distance: the probability mass on which student and teacher disagree.

    Args:
        student_logits: ``[..., V]`` scores of the student; receives the gradient.
        teacher_logits: ``[..., V]`` scores of the teacher; treated as constant.
        temperature: divides both, > 0.

    Returns:
        ``[...]`` float32, between 0 and 1; a share of probability, not nats. Where p = q its gradient is taken as 0.

    Raises:
        ValueError: if the shapes differ, as with vocabularies padded to different sizes, or the temperature is not > 0.

    Source: f-distill, https://arxiv.org/abs/2307.15190.
    """
    return evaluate(_total_variation, student_logits, teacher_logits, temperature)


def _total_variation(q: Distribution, p: Distribution) -> tuple[Tensor, Tensor]:
    excess = torch.sub(q.probs, p.probs, out=p.probs)
    value = 0.5 * torch.abs(excess, out=q.logprobs).sum(-1)
    return value, excess.sign_().mul_(q.probs).mul_(0.5)


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Per-token cross-entropy of the teacher's distribution: forward KL, and its gradient, plus the teacher's entropy.

    Args:
        student_logits: ``[..., V]`` scores of the student; receives the gradient.
        teacher_logits: ``[..., V]`` scores of the teacher; treated as constant.
        temperature: divides both, > 0. The result is not multiplied by its square.

    Returns:
        ``[...]`` float32, nats, >= 0; +inf where a token of the teacher is impossible for the student.

    Raises:
        ValueError: if the shapes differ, as with vocabularies padded to different sizes, or the temperature is not > 0.

    Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2.
    """
    return evaluate(_soft_cross_entropy, student_logits, teacher_logits, temperature)


def _soft_cross_entropy(q: Distribution, p: Distribution) -> tuple[Tensor, Tensor]:
    infinite = mass_where_impossible(p, q)
    derivative = p.probs.neg_()
    return q.logprobs.mul_(derivative).sum(-1) + infinite, derivative


def _mixture(p: Distribution, q: Distribution, share: float) -> Tensor:
    """Share * p + (1 - share) * q; at least `TINY`, so that its logarithm is finite where both are 0."""
    return torch.mul(p.probs, share).add_(q.probs, alpha=1 - share).clamp_(min=TINY)


def _check_skew(skew: float, limit: str) -> None:
    if skew == 0:
        raise ValueError(f"skew: 0 is the plain divergence, {limit}: use that.")
    if not 0 < skew < 1:
        raise ValueError(f"skew: expected a share inside (0, 1), got {skew}; at 1 the divergence is 0 everywhere.")
