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

Every gradient is computed in closed form, as the derivative by log q; autograd applies that of log-softmax. So besides the
student's log-probabilities, a single ``[..., V]`` is stored for the backward pass. Terms proportional to q alone are left
out of it, because log-softmax cancels them. The functions are differentiable once.

| function | formula | source |
|---|---|---|
| `forward_kl` | KL(p‖q) | Hinton et al. 2015, arXiv 1503.02531 |
| `reverse_kl` | KL(q‖p) | MiniLLM, arXiv 2306.08543; the Single term is this per position |
| `jensen_shannon` | β KL(p‖m) + (1−β) KL(q‖m), m = βp + (1−β)q | GKD, arXiv 2306.13649 |
| `skew_forward_kl` | KL(p‖αp + (1−α)q) | DistiLLM, arXiv 2402.03898 |
| `skew_reverse_kl` | KL(q‖(1−α)p + αq) | DistiLLM, arXiv 2402.03898 |
| `total_variation` | ½ Σ abs(p − q) | f-distill, arXiv 2307.15190 |
| `adaptive_kl` | w KL(p‖q) + (1−w) KL(q‖p) | AKL, arXiv 2404.02657 |
| `soft_cross_entropy` | −Σ p log q = KL(p‖q) + entropy of p | Hinton et al. 2015 |
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_distill.functional.distributions import (
    has_support_gap,
    infinite_where,
    log_mixture,
    student_and_teacher_log_probs,
    with_gradient,
)


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
    log_q, log_p = student_and_teacher_log_probs(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        p = log_p.exp()
        value = (p * (log_p - log_q)).sum(-1) + infinite_where(has_support_gap(log_p, log_q))
    return with_gradient(value, log_q, p.neg_())


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
    log_q, log_p = student_and_teacher_log_probs(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        terms = log_q.exp() * (log_q - log_p)
        value = terms.sum(-1) + infinite_where(has_support_gap(log_q, log_p))
    return with_gradient(value, log_q, terms)


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
    log_q, log_p = student_and_teacher_log_probs(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        p, q = log_p.exp(), log_q.exp()
        log_m = log_mixture(p, q, beta)
        student_terms = q.mul_(log_q - log_m).mul_(1 - beta)
        value = beta * p.mul_(log_p - log_m).sum(-1) + student_terms.sum(-1)
    return with_gradient(value, log_q, student_terms)


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
    log_q, log_p = student_and_teacher_log_probs(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        p, q = log_p.exp(), log_q.exp()
        log_ratio = log_p - log_mixture(p, q, skew)
        value = p.mul_(log_ratio).sum(-1)
        gradient = q.mul_(log_ratio.exp_()).mul_(skew - 1)
    return with_gradient(value, log_q, gradient)


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
    log_q, log_p = student_and_teacher_log_probs(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        p, q = log_p.exp(), log_q.exp()
        log_ratio = log_q - log_mixture(p, q, 1 - skew)
        terms = q * log_ratio
        value = terms.sum(-1)
        gradient = terms.sub_(q.mul_(log_ratio.exp_()), alpha=skew)
    return with_gradient(value, log_q, gradient)


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
    log_q, log_p = student_and_teacher_log_probs(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        q = log_q.exp()
        excess = q - log_p.exp()
        value = 0.5 * excess.abs().sum(-1)
        gradient = q.mul_(excess.sign_()).mul_(0.5)
    return with_gradient(value, log_q, gradient)


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
        ``[...]`` float32, nats, >= 0; 0 at p = q, where the weights are 0/0. Costs a sort of the vocabulary.

    Raises:
        ValueError: if head_mass is not inside (0, 1), the shapes differ or the temperature is not > 0.

    Source: AKL, https://arxiv.org/abs/2404.02657.
    """
    if not 0 < head_mass < 1:
        raise ValueError(f"head_mass: expected a probability inside (0, 1), got {head_mass}.")
    log_q, log_p = student_and_teacher_log_probs(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        p, q = log_p.exp(), log_q.exp()
        weight = _share_of_gap_in_head(p, q, head_mass)
        infinite = ((weight > 0) & has_support_gap(log_p, log_q)) | ((weight < 1) & has_support_gap(log_q, log_p))
        forward, reverse = p.mul_(weight.unsqueeze(-1)), q.mul_(1 - weight.unsqueeze(-1))
        log_ratio = log_q - log_p
        reverse_terms = reverse.mul_(log_ratio)
        value = (reverse_terms - forward * log_ratio).sum(-1) + infinite_where(infinite)
    return with_gradient(value, log_q, reverse_terms.sub_(forward))


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
    log_q, log_p = student_and_teacher_log_probs(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        p = log_p.exp()
        value = -(p * log_q).sum(-1) + infinite_where(has_support_gap(log_p, log_q))
    return with_gradient(value, log_q, p.neg_())


def _share_of_gap_in_head(p: Tensor, q: Tensor, head_mass: float) -> Tensor:
    """[...]: share of sum(abs(p - q)) on the smallest set of tokens with ``head_mass`` of p; 0 for p = q."""
    sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
    gap = (sorted_p - q.gather(-1, order)).abs_()
    in_head = (
        sorted_p.cumsum(-1).sub_(sorted_p) < head_mass
    )  # compares the mass before a token, so the one that crosses head_mass is in the head
    return (gap * in_head).sum(-1) / gap.sum(-1).clamp(min=torch.finfo(gap.dtype).tiny)


def _check_skew(skew: float, limit: str) -> None:
    if skew == 0:
        raise ValueError(f"skew: 0 is the plain divergence, {limit}: use that.")
    if not 0 < skew < 1:
        raise ValueError(f"skew: expected a share inside (0, 1), got {skew}; at 1 the divergence is 0 everywhere.")
