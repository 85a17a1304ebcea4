"""Exposure bias: how much a student errs for walking its own way rather than its teacher's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_distill.functional.masked import check_shapes, widen

RESOLUTION = 1e-6
"""Nats per token below which a sum of float32 divergences is rounding."""


class ExposureBias(NamedTuple):
    """Three curves over the length l; entry l − 1 is that of the first l tokens."""

    regret: Tensor
    """[T] nats: R(l), errors summed along texts that the student wrote."""
    baseline: Tensor
    """[T] nats: l·ε(l), errors summed along texts that the teacher wrote."""
    excess: Tensor
    """[T] percent: ExAccErr(l), how much larger R(l) is than l·ε(l), in percent of it."""


def exposure_bias(student_errors: Tensor, teacher_errors: Tensor) -> ExposureBias:
    r"""Excess accumulated error of a student over all lengths: 0 for one that errs on its own texts as on its teacher's.

    Where both sums are below 1e-6 nats per token, student and teacher are one up to rounding, and the excess is 0 rather
    than 0/0. If the student errs on its own texts alone it is +inf. A ratio of two estimates is biased by about one over
    the number of texts.

    Args:
        student_errors: ``[T]`` nats: the mean of e_t = KL(teacher || student) over prefixes that the student wrote.
        teacher_errors: ``[T]`` nats: the same over prefixes that the teacher wrote.

    Returns:
        Curves ``[T]``.

    Raises:
        ValueError: if the shapes differ.

    Source: Arora et al. 2022, https://arxiv.org/abs/2204.01171; MiniLLM, https://arxiv.org/abs/2306.08543, section 3.3.
    """
    check_shapes(student_errors=student_errors, teacher_errors=teacher_errors)
    regret, baseline = widen(student_errors).cumsum(dim=-1), widen(teacher_errors).cumsum(dim=-1)
    rounding = RESOLUTION * torch.arange(1, regret.shape[-1] + 1, device=regret.device)
    equal = (regret < rounding) & (baseline < rounding)
    return ExposureBias(regret, baseline, torch.where(equal, 0.0, 100 * (regret - baseline) / baseline))
