"""Exposure bias: excess accumulated error of a student on its own prefixes over the teacher's prefixes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_distill.functional.masking import check_shapes, upcast

RESOLUTION = 1e-6
"""Nats per token; a sum of float32 divergences below it is considered rounding error."""


class ExposureBias(NamedTuple):
    """Three curves over the length l; entry l − 1 is the value for the first l tokens."""

    regret: Tensor
    """[T] nats: R(l), errors accumulated along sequences that the student generated."""
    baseline: Tensor
    """[T] nats: l·ε(l), errors accumulated along sequences that the teacher generated."""
    excess: Tensor
    """[T] percent: ExAccErr(l), by how many percent R(l) is larger than l·ε(l)."""


def exposure_bias(student_errors: Tensor, teacher_errors: Tensor) -> ExposureBias:
    r"""Excess accumulated error of a student at every length: 0 if its error is the same on its own and the teacher's prefixes.

    Where both sums are below 1e-6 nats per token, student and teacher are equal up to rounding, and the excess is 0 rather
    than 0/0. If the student has errors on its own prefixes only, it is +inf. As a ratio of two estimates it is biased, by about
    one over the number of sequences.

    Args:
        student_errors: ``[T]`` nats: the mean of e_t = KL(teacher || student) over prefixes that the student generated.
        teacher_errors: ``[T]`` nats: the same over prefixes that the teacher generated.

    Returns:
        Curves ``[T]``.

    Raises:
        ValueError: if the shapes differ.

    Source: Arora et al. 2022, https://arxiv.org/abs/2204.01171; MiniLLM, https://arxiv.org/abs/2306.08543, section 3.3.
    """
    check_shapes(student_errors=student_errors, teacher_errors=teacher_errors)
    regret, baseline = upcast(student_errors).cumsum(dim=-1), upcast(teacher_errors).cumsum(dim=-1)
    rounding = RESOLUTION * torch.arange(1, regret.shape[-1] + 1, device=regret.device)
    equal = (regret < rounding) & (baseline < rounding)
    return ExposureBias(regret, baseline, torch.where(equal, 0.0, 100 * (regret - baseline) / baseline))
