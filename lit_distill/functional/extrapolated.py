r"""Reverse KL to a target beyond the teacher: the direction from a reference model to the teacher, followed further.

| | G-OPD / ExOPD (paper) | here |
|---|---|---|
| objective | reward log p − log q + (λ−1)(log p − log ref) | KL(q ‖ p^λ ref^(1−λ)/Z) in closed form, per token |
| λ | 1.25; 1.5 was unstable | `scale`, > 0 |

Source: G-OPD, https://arxiv.org/abs/2602.12125.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_distill.functional.distributions import (
    IMPOSSIBLE,
    check_same_vocabulary,
    check_temperature,
    finite_log_softmax,
)
from lit_distill.functional.divergences import reverse_kl


def extrapolated_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    reference_logits: Tensor,
    scale: float = 1.25,
    temperature: float = 1.0,
) -> Tensor:
    r"""Per-token KL(q ‖ p^λ ref^(1−λ)/Z): with λ > 1 the student goes further from the reference than the teacher did.

    With λ = 1 it is `reverse_kl`. With λ = 1/(1+b) < 1 the reference holds the student back: (1+b) times its gradient is that of
    KL(q ‖ p) + b KL(q ‖ ref). Biased for λ ≠ 1 in that its minimum is not the teacher, which is the purpose. Per token Z is
    exact; over whole responses the product of these targets is not the normalised p^λ ref^(1−λ) of responses.

    Args:
        student_logits: ``[..., V]`` scores of the student; receives the gradient.
        teacher_logits: ``[..., V]`` scores of the teacher; treated as constant.
        reference_logits: ``[..., V]`` scores of the reference, such as the student or the teacher before training; constant.
        scale: λ, > 0.
        temperature: divides all three, > 0.

    Returns:
        ``[...]`` float32, nats, >= 0. A token that is impossible for the teacher is impossible for the target: +inf where the
        student has it, with the finite gradient of `reverse_kl`. For a token that only the reference finds impossible p^λ ref^(1−λ)
        would be infinite if λ > 1; the target then takes its p alone (factor p/ref = 1). If λ < 1, log ref counts as −10,000
        there, so that the value stays finite.

    Raises:
        ValueError: if the scale is not > 0 and finite, the shapes differ or the temperature is not > 0.

    Source: G-OPD, https://arxiv.org/abs/2602.12125.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a finite number > 0, got {scale}; 1 is the teacher, 1.25 goes beyond it.")
    check_temperature(temperature)
    check_same_vocabulary(student_logits, teacher_logits)
    if reference_logits.shape != student_logits.shape:
        raise ValueError(
            f"reference_logits: expected the shape {list(student_logits.shape)} of student_logits, got "
            f"{list(reference_logits.shape)}: score the same positions and tokens with the reference."
        )
    with torch.no_grad():
        log_p, log_ref = (finite_log_softmax(logits, temperature) for logits in (teacher_logits, reference_logits))
        if scale >= 1:
            log_ref = torch.where(log_ref <= IMPOSSIBLE, log_p, log_ref)
        target = torch.lerp(log_ref, log_p, scale).masked_fill_(log_p <= IMPOSSIBLE, -torch.inf)
        target *= temperature  # the divergence divides by it
    return reverse_kl(student_logits, target, temperature)
