"""Checks the chunked head against the unchunked loss in float64, and its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_checks.machine import Machine
from gpu_checks.table import Row, below, measured, skipped
from lit_distill import functional
from lit_distill.functional import fused
from lit_distill.losses import ChunkedTokenLoss
from lit_distill.models import LMHead
from lit_distill.objectives import ForwardKL, NextToken
from lit_distill.teachers import HiddenRows

LIMITS = {"32-true": 1e-5, "bf16-mixed": 2e-2}


def checks(machine: Machine) -> list[tuple[str, Callable[[], Iterable[Row]]]]:
    """The checks of values, of the divergences and of memory."""
    parts = (values, divergences, memory)
    return [("chunked head", partial(part, machine)) for part in parts]


def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Forward KL and cross-entropy, half of each, as means over the rows, by the chunked head."""
    objectives = {"kl": ForwardKL(), "ce": NextToken()}
    factors = dict.fromkeys(objectives, 0.5 / len(labels))
    return ChunkedTokenLoss(
        objectives, factors, LMHead(weight), {"labels": labels}, HiddenRows(teacher[0], LMHead(teacher[1]))
    )(hidden)


def whole_loss(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
    """The same loss without chunks, in the precision of its inputs."""
    log_q = (hidden @ weight.T).log_softmax(dim=-1)
    log_p = (teacher[0] @ teacher[1].T).log_softmax(dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return 0.5 * divergence.mean() + 0.5 * F.nll_loss(log_q, labels)


def values(machine: Machine) -> Iterator[Row]:
    """Compare value and gradients in both precisions; for bfloat16 the reference uses the rounded inputs."""
    rows, vocabulary, width = (2048, 32_000, 512) if machine.cuda else (256, 4_000, 64)
    for precision, limit in LIMITS.items():
        dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
        numbers = torch.Generator().manual_seed(0)
        parts = [torch.randn(size, generator=numbers) for size in ((rows, width), (vocabulary, width)) * 2]
        hidden, weight, teacher_hidden, teacher_weight = (
            (part / (1 if index % 2 == 0 else width**0.5)).to(machine.device, dtype) for index, part in enumerate(parts)
        )
        labels = torch.randint(vocabulary, (rows,), generator=numbers).to(machine.device)
        teacher = teacher_hidden, teacher_weight
        wide = [part.double().requires_grad_() for part in (hidden, weight)]
        expected = whole_loss(*wide, labels, (teacher_hidden.double(), teacher_weight.double()))
        expected.backward()
        ours = [hidden.requires_grad_(), weight.float().requires_grad_()]
        with machine.autocast(precision):
            value = loss_of(*ours, labels, teacher)
        value.backward()
        error = abs(float(value.detach() / expected.detach() - 1))
        yield below(f"{precision}: value against float64 at once, relative", error, limit)
        for name, part, reference in zip(("hidden rows", "head"), ours, wide, strict=True):
            error = (part.grad.double() - reference.grad).norm() / reference.grad.norm()
            yield below(f"{precision}: gradient of the {name}, relative", float(error), limit)


def divergences(machine: Machine) -> Iterator[Row]:
    """Compare each divergence, on CUDA computed by the kernel, with its formula in float32 on the CPU; rows with gaps too."""
    numbers = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(64, 20_000, generator=numbers) for _ in range(2))
    student[:4, ::3] = teacher[:4, ::3] = -torch.inf  # impossible for both
    student[4:6, 7], teacher[6:8, 7] = -torch.inf, -torch.inf  # for one
    for name in fused.KINDS:
        found = [
            _value_and_gradient(name, student, teacher, device) for device in (torch.device("cpu"), machine.device)
        ]
        (expected, expected_gradient), (value, gradient) = found
        finite = expected.isfinite()
        assert torch.equal(finite, value.isfinite()), f"{name}: other values are infinite"
        yield below(f"{name}: value, absolute", float((value - expected)[finite].abs().max()), 1e-4)
        error = (gradient - expected_gradient).norm() / expected_gradient.norm()
        yield below(f"{name}: gradient, relative", float(error), 1e-4)


def _value_and_gradient(name: str, student: Tensor, teacher: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    logits = student.to(device, copy=True).requires_grad_()
    value = getattr(functional, name)(logits, teacher.to(device))
    (gradient,) = torch.autograd.grad(value[value.isfinite()].sum(), logits)
    return value.detach().cpu(), gradient.cpu()


def memory(machine: Machine) -> Iterator[Row]:
    """Check that memory, without the rows and their gradient, does not grow with the number of rows."""
    if not machine.cuda:
        yield skipped("memory beside the rows", "not measurable on a CPU")
        return
    vocabulary, width, device = 151_936, 896, machine.device
    weight = torch.randn(vocabulary, width, device=device).mul_(0.03).requires_grad_()
    taken = []
    for rows in (4096, 16_384):
        hidden = torch.randn(rows, width, device=device, dtype=torch.bfloat16).requires_grad_()
        labels = torch.randint(vocabulary, (rows,), device=device)
        teacher = torch.randn(rows, width, device=device, dtype=torch.bfloat16), weight.detach().bfloat16()
        machine.wait()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with machine.autocast("bf16-mixed"):
            value = loss_of(hidden, weight, labels, teacher)
        machine.wait()
        own = hidden.numel() * hidden.element_size()  # the gradient of the rows
        taken.append(torch.cuda.max_memory_allocated(device) - before - own)
        del value
    logits = 4 * 16_384 * vocabulary
    yield measured(
        "memory beside 16,384 rows and their gradient, GiB", taken[1] / 2**30, f"their logits: {logits / 2**30:.1f} GiB"
    )
    yield below("the same, relative to that beside 4,096 rows", taken[1] / taken[0], 1.02)
