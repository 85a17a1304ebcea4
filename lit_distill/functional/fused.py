"""Value and gradient of the divergences in one Triton kernel, for GPUs: one program per row reads its logits a tile at a time.

The formulas of `divergences` take some twenty passes over memory, which on a GPU costs more than the matrix products. The kernel
takes three: normalisation, value, gradient. PyTorch for CUDA brings Triton; without it, the formulas are used.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
from torch import Tensor

from lit_distill.functional.distributions import IMPOSSIBLE as IMPOSSIBLE_LOGPROB
from lit_distill.functional.distributions import NO_MASS as NO_MASS_LOGPROB

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

KINDS = {
    name: kind
    for kind, name in enumerate(
        (
            "forward_kl",
            "reverse_kl",
            "jensen_shannon",
            "skew_forward_kl",
            "skew_reverse_kl",
            "total_variation",
            "soft_cross_entropy",
        )
    )
}
"""Divergences that the kernel knows, by the name of their function."""
TILE = 4096
"""Tokens that a program holds at a time."""


def runs_fused(logits: Tensor) -> bool:
    """Whether the kernel runs where these logits are."""
    return triton is not None and logits.is_cuda


def evaluate_fused(
    name: str, student: Tensor, teacher: Tensor, temperature: float, share: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Value ``[N]`` and, if asked for, gradient by the tempered student logits ``[N, V]``, both float32.

    Args:
        name: one of `KINDS`.
        student: ``[N, V]`` logits.
        teacher: ``[N, V]`` logits.
        temperature: divides both.
        share: the ``beta`` or ``skew`` of the divergence; 0 if it has none.
        with_gradient: whether to compute the gradient.
    """
    rows, vocabulary = student.shape
    student, teacher = (logits if logits.stride(-1) == 1 else logits.contiguous() for logits in (student, teacher))
    value = torch.empty(rows, dtype=torch.float32, device=student.device)
    gradient = torch.empty(rows, vocabulary, dtype=torch.float32, device=student.device) if with_gradient else None
    if rows:
        tile = min(TILE, triton.next_power_of_2(vocabulary))
        _divergence_of_row[(rows,)](
            student, teacher, value, value if gradient is None else gradient, student.stride(0), teacher.stride(0),
            vocabulary, 1 / temperature, share, kind=KINDS[name], with_gradient=with_gradient,
            tile=tile, num_warps=8,
        )  # fmt: skip
    return value, gradient


if triton is not None:
    FLOOR = tl.constexpr(-1e30)  # of logits: -inf minus -inf would be NaN
    IMPOSSIBLE = tl.constexpr(IMPOSSIBLE_LOGPROB)
    NO_MASS = tl.constexpr(NO_MASS_LOGPROB)
    TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

    @triton.jit
    def _scores(logits, columns, vocabulary, inverse_temperature):
        """A tile of tempered logits; `FLOOR` outside the vocabulary."""
        loaded = tl.load(logits + columns, mask=columns < vocabulary, other=-float("inf")).to(tl.float32)
        return tl.maximum(loaded * inverse_temperature, FLOOR, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def _log_normalizer(logits, vocabulary, inverse_temperature, tile: tl.constexpr):
        """Log Σ exp of a row, with the largest score so far as the scale."""
        largest = tl.full((), FLOOR, tl.float32)
        total = tl.full((), 0.0, tl.float32)
        for start in range(0, vocabulary, tile):
            scores = _scores(logits, start + tl.arange(0, tile), vocabulary, inverse_temperature)
            larger = tl.maximum(largest, tl.max(scores, axis=0))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(scores - larger), axis=0)
            largest = larger
        return largest + tl.log(total)

    @triton.jit
    def _log_mixture(p, q, share):
        """log(share * p + (1 - share) * q), finite where both are 0."""
        return tl.log(tl.maximum(share * p + (1 - share) * q, TINY))

    @triton.jit
    def _terms(
        student, teacher, columns, vocabulary, inverse_temperature, log_q_total, log_p_total, share, kind: tl.constexpr
    ):
        """Of a tile: terms of the value, derivatives by log q, q, and whether a term is infinite; see `divergences`."""
        log_q = _scores(student, columns, vocabulary, inverse_temperature) - log_q_total
        log_p = _scores(teacher, columns, vocabulary, inverse_temperature) - log_p_total
        no_q, no_p = log_q <= IMPOSSIBLE, log_p <= IMPOSSIBLE
        log_q = tl.where(no_q, IMPOSSIBLE, log_q)
        log_p = tl.where(no_p, IMPOSSIBLE, log_p)
        q, p = tl.exp(log_q), tl.exp(log_p)
        infinite = no_q & (log_p > NO_MASS)
        never = no_q & (log_q > NO_MASS)  # log_q is `IMPOSSIBLE` there
        if kind == 0:  # forward_kl
            value = p * (log_p - log_q)
            derivative = -p
        elif kind == 1:  # reverse_kl
            infinite = no_p & (log_q > NO_MASS)
            value = q * (log_q - log_p)
            derivative = value
        elif kind == 2:  # jensen_shannon
            infinite = never
            log_m = _log_mixture(p, q, share)
            derivative = (1 - share) * q * (log_q - log_m)
            value = share * p * (log_p - log_m) + derivative
        elif kind == 3:  # skew_forward_kl
            infinite = never
            log_ratio = log_p - _log_mixture(p, q, share)
            value = p * log_ratio
            derivative = (share - 1) * q * tl.exp(log_ratio)
        elif kind == 4:  # skew_reverse_kl
            infinite = never
            log_ratio = log_q - _log_mixture(p, q, 1 - share)
            value = q * log_ratio
            derivative = value - share * q * tl.exp(log_ratio)
        elif kind == 5:  # total_variation
            infinite = never
            value = 0.5 * tl.abs(q - p)
            derivative = 0.5 * q * ((q > p).to(tl.float32) - (q < p).to(tl.float32))
        else:  # soft_cross_entropy
            value = -p * log_q
            derivative = -p
        return value, tl.where(no_q, 0.0, derivative), q, infinite

    @triton.jit
    def _divergence_of_row(
        student, teacher, values, gradients, student_stride, teacher_stride, vocabulary, inverse_temperature, share,
        kind: tl.constexpr, with_gradient: tl.constexpr, tile: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)  # times the vocabulary it exceeds 32 bits
        student += row * student_stride
        teacher += row * teacher_stride
        log_q_total = _log_normalizer(student, vocabulary, inverse_temperature, tile)
        log_p_total = _log_normalizer(teacher, vocabulary, inverse_temperature, tile)
        value = tl.full((), 0.0, tl.float32)
        total = tl.full((), 0.0, tl.float32)
        infinite = tl.full((), 0, tl.int32)
        for start in range(0, vocabulary, tile):
            columns = start + tl.arange(0, tile)
            terms, derivatives, _, unbounded = _terms(
                student, teacher, columns, vocabulary, inverse_temperature, log_q_total, log_p_total, share, kind
            )
            value += tl.sum(terms, axis=0)
            total += tl.sum(derivatives, axis=0)
            infinite = tl.maximum(infinite, tl.max(unbounded.to(tl.int32), axis=0))
        tl.store(values + row, tl.where(infinite > 0, float("inf"), value))
        if with_gradient:
            gradients += row * vocabulary
            for start in range(0, vocabulary, tile):
                columns = start + tl.arange(0, tile)
                _, derivatives, q, _ = _terms(
                    student, teacher, columns, vocabulary, inverse_temperature, log_q_total, log_p_total, share, kind
                )
                tl.store(gradients + columns, derivatives - q * total, mask=columns < vocabulary)  # through log-softmax
