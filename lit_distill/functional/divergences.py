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

| function | formula | source |
|---|---|---|
| `forward_kl` | KL(p‖q) | Hinton et al. 2015, arXiv 1503.02531 |
| `reverse_kl` | KL(q‖p) | MiniLLM, arXiv 2306.08543; the Single term is this per position |
| `jensen_shannon` | β KL(p‖m) + (1−β) KL(q‖m), m = βp + (1−β)q | GKD, arXiv 2306.13649 |
| `skew_forward_kl` | KL(p‖αp + (1−α)q) | DistiLLM, arXiv 2402.03898 |
| `skew_reverse_kl` | KL(q‖(1−α)p + αq) | DistiLLM, arXiv 2402.03898 |
| `total_variation` | ½ Σ abs(p − q) | f-distill, arXiv 2307.15190 |
| `adaptive_kl` | w KL(p‖q) + (1−w) KL(q‖p), w from the gap in the teacher's head | AKL, arXiv 2404.02657 |
| `entropy_gated_kl` | w KL(p‖q) + (1−w) KL(q‖p), w from the entropy of p | EOPD, arXiv 2603.07079; w is ours |
| `soft_cross_entropy` | −Σ p log q = KL(p‖q) + entropy of p | Hinton et al. 2015 |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_distill.functional.closed_form import Distribution, evaluate, mass_where_impossible
from lit_distill.functional.distributions import entropy

TINY = torch.finfo(torch.float32).tiny
HEAD_TOKENS = 128
"""Tokens of a row that `adaptive_kl` sorts first; a trained teacher's head is smaller."""


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


def _mixture(p: Distribution, q: Distribution, share: float) -> Tensor:
    """Share * p + (1 - share) * q; at least `TINY`, so that its logarithm is finite where both are 0."""
    return torch.mul(p.probs, share).add_(q.probs, alpha=1 - share).clamp_(min=TINY)


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


def _check_skew(skew: float, limit: str) -> None:
    if skew == 0:
        raise ValueError(f"skew: 0 is the plain divergence, {limit}: use that.")
    if not 0 < skew < 1:
        raise ValueError(f"skew: expected a share inside (0, 1), got {skew}; at 1 the divergence is 0 everywhere.")
