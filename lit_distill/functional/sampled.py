r"""Reverse KL from the sampled token alone: a policy gradient with the exact KL as its baseline.

| | vOPD (paper) | here |
|---|---|---|
| reward | log p(y) − log q(y) | the same, with the opposite sign: a loss |
| baseline | E_q[reward] = −KL(q‖p), detached; or its top-k approximation | the exact one, or none |

Source: vOPD, https://arxiv.org/abs/2605.07865.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_distill.functional.distributions import (
    IMPOSSIBLE,
    check_same_vocabulary,
    check_temperature,
    finite_log_softmax,
)


def sampled_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    baseline: bool = True,
    temperature: float = 1.0,
) -> Tensor:
    r"""Per-token estimate log q(y) − log p(y) of KL(q ‖ p), with the gradient (log q(y) − log p(y) − b) ∇log q(y).

    Value and gradient are unbiased if y is drawn from the student as it is now, at this temperature and without truncation
    (no top-k, no top-p). Texts of a data set, of a mixture or of an earlier student bias both. The gradient is that of the
    reverse KL of this token: the effect of y on later tokens, MiniLLM's Long term, is not in it. The baseline b does not change
    the mean, and usually lowers the variance. It can raise it where the student is confident and the teacher disagrees: b then fits
    the token that is nearly always drawn, whose gradient is small anyway, and not the rare ones.

    Args:
        student_logits: ``[..., V]`` scores of the student; receives the gradient.
        teacher_logits: ``[..., V]`` scores of the teacher; treated as constant.
        labels: ``[...]`` int64, the sampled tokens y.
        baseline: b = KL(q ‖ p), a constant; else b = 0.
        temperature: divides both, > 0.

    Returns:
        ``[...]`` float32, nats; may be negative. +inf where y is impossible for the teacher; the gradient uses −10,000 for log 0,
        in b too, so that it is finite and keeps its mean. A y that is impossible for the student, which it cannot have drawn, has
        a finite value and no gradient.

    Raises:
        ValueError: if the shapes differ or the temperature is not > 0.

    Source: vOPD, https://arxiv.org/abs/2605.07865.
    """
    check_temperature(temperature)
    check_same_vocabulary(student_logits, teacher_logits)
    if labels.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"labels: expected one token for each position, {list(student_logits.shape[:-1])}, got {list(labels.shape)}."
        )
    ids = labels.unsqueeze(-1)
    student = student_logits.float() / temperature
    logprobs = (student.gather(-1, ids) - student.logsumexp(-1, keepdim=True)).squeeze(-1).clamp(min=IMPOSSIBLE)
    with torch.no_grad():
        log_p = finite_log_softmax(teacher_logits, temperature)
        teacher_logprobs = log_p.gather(-1, ids).squeeze(-1)
        estimate = logprobs - teacher_logprobs
        advantage = estimate
        if baseline:
            log_q = finite_log_softmax(student_logits, temperature)
            advantage = estimate - (log_q.exp() * (log_q - log_p)).sum(-1)
        value = estimate.masked_fill((teacher_logprobs <= IMPOSSIBLE) & (logprobs > IMPOSSIBLE), torch.inf)
    return value + advantage * (logprobs - logprobs.detach())
