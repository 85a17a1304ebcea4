"""P1: the chunked head, value and gradients, against its matrix products alone, the loss on all logits, and TRL's kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import MB, Bench, PeakMemory, alternate
from benchmarks.results import Result, at_most, compared, limited, measured, skipped
from benchmarks.trl_peer import NOT_INSTALLED, installed
from lit_distill.losses import ChunkedTokenLoss
from lit_distill.models import LMHead
from lit_distill.models.lm_head import chunk_rows_for
from lit_distill.objectives import (
    AdaptiveKL,
    ForwardKL,
    JensenShannon,
    NextToken,
    Objective,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from lit_distill.teachers import HiddenRows

PRODUCTS = "bare products"
SHARPNESS = 4
"""Of the teacher's logits: most of the probability is on few tokens, as with a trained model."""
GROUPS: tuple[dict[str, tuple[type[Objective], ...]], ...] = (
    {"ForwardKL": (ForwardKL,), "ReverseKL": (ReverseKL,), "JensenShannon": (JensenShannon,)},
    {"SkewForwardKL": (SkewForwardKL,), "SkewReverseKL": (SkewReverseKL,), "TotalVariation": (TotalVariation,)},
    {"AdaptiveKL": (AdaptiveKL,), "ForwardKL + NextToken": (ForwardKL, NextToken)},
)
"""Objectives that alternate with one measurement of the products."""
ALONE: dict[str, tuple[type[Objective], ...]] = {"NextToken": (NextToken,)}


@dataclass(frozen=True)
class Rows:
    """Hidden rows and heads of both models."""

    hidden: Tensor
    """[N, H], a leaf."""
    weight: Tensor
    """[V, H], a leaf."""
    labels: Tensor
    """[N]."""
    teacher_hidden: Tensor
    """[N, H']."""
    teacher_weight: Tensor
    """[V, H']."""
    bench: Bench
    mixed: bool = False
    """Whether products are computed in bfloat16, with a float32 weight."""

    def first(self, count: int) -> Rows:
        """The first rows, as leaves."""
        hidden = self.hidden.detach()[:count].clone().requires_grad_()
        return replace(self, hidden=hidden, labels=self.labels[:count], teacher_hidden=self.teacher_hidden[:count])

    def forget_gradients(self) -> None:
        """Free the gradients of the call before."""
        self.hidden.grad = self.weight.grad = None

    @property
    def gradient_bytes(self) -> int:
        """Of the two gradients, which every way to compute them has to store."""
        return sum(part.numel() * part.element_size() for part in (self.hidden, self.weight))


def random_rows(bench: Bench, rows: int, vocabulary: int, width: int, teacher_width: int, mixed: bool = False) -> Rows:
    """Rows whose logits have about unit variance for the student, and `SHARPNESS` times that scale for the teacher."""
    numbers = torch.Generator(bench.machine.device).manual_seed(0)
    device, dtype = bench.machine.device, torch.bfloat16 if mixed else torch.float32

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=numbers, device=device) * scale

    return Rows(
        draw(rows, width).to(dtype).requires_grad_(),
        draw(vocabulary, width, scale=width**-0.5).requires_grad_(),
        torch.randint(vocabulary, (rows,), generator=numbers, device=device),
        draw(rows, teacher_width).to(dtype),
        draw(vocabulary, teacher_width, scale=SHARPNESS * teacher_width**-0.5).to(dtype),
        bench,
        mixed,
    )


def chunked(rows: Rows, kinds: tuple[type[Objective], ...]) -> None:
    """Value and gradients of the project."""
    rows.forget_gradients()
    objectives = {kind.__name__: kind() for kind in kinds}
    loss = ChunkedTokenLoss(
        objectives,
        dict.fromkeys(objectives, 1 / len(rows.hidden)),
        LMHead(rows.weight),
        {"labels": rows.labels},
        HiddenRows(rows.teacher_hidden, LMHead(rows.teacher_weight)),
    )
    with rows.bench.machine.autocast("bf16-mixed" if rows.mixed else "32-true"):
        value = loss(rows.hidden)
    value.backward()


class Products:
    """The matrix products alone, a chunk of the project's size at a time, into buffers that exist already.

    Per chunk: projection of the student, projection of the teacher, gradient of the rows, gradient of the weight.

    Args:
        rows: inputs; the dtype of its hidden rows is that of the products.
        teacher: whether the teacher's projection is one of them.
        chunk_rows: rows of a chunk; by default as many as the project takes.
    """

    def __init__(self, rows: Rows, teacher: bool = True, chunk_rows: int | None = None) -> None:
        self.rows = rows
        self.teacher = teacher
        self.chunk = min(chunk_rows or chunk_rows_for(LMHead(rows.weight)), len(rows.hidden))
        self.hidden = rows.hidden.detach()
        self.weight = rows.weight.detach().to(self.hidden.dtype)
        self.logits = self.hidden.new_empty(self.chunk, len(self.weight))
        self.teacher_logits = torch.empty_like(self.logits) if teacher else None
        self.grad_hidden = torch.empty_like(self.hidden)
        self.grad_weight = torch.empty_like(self.weight, dtype=torch.float32)
        for buffer in (self.logits, self.teacher_logits, self.grad_hidden, self.grad_weight):
            if buffer is not None:
                buffer.zero_()  # touched once, so that the system gives its pages before the first round

    def __call__(self) -> None:
        """Do them once."""
        for start in range(0, len(self.hidden), self.chunk):
            part = slice(start, start + self.chunk)
            hidden = self.hidden[part]
            logits = self.logits[: len(hidden)]
            torch.mm(hidden, self.weight.T, out=logits)
            if self.teacher_logits is not None:
                torch.mm(
                    self.rows.teacher_hidden[part], self.rows.teacher_weight.T, out=self.teacher_logits[: len(hidden)]
                )
            torch.mm(logits, self.weight, out=self.grad_hidden[part])
            if self.rows.mixed:
                self.grad_weight += logits.T @ hidden
            else:
                self.grad_weight.addmm_(logits.T, hidden)


def whole(rows: Rows) -> None:
    """Forward KL of all logits at once, by autograd."""
    rows.forget_gradients()
    log_q = (rows.hidden @ rows.weight.to(rows.hidden.dtype).T).float().log_softmax(dim=-1)
    log_p = (rows.teacher_hidden @ rows.teacher_weight.T).float().log_softmax(dim=-1)
    (F.kl_div(log_q, log_p, reduction="sum", log_target=True) / len(rows.hidden)).backward()


def trl_kernel(rows: Rows) -> None:
    """Forward KL by TRL's chunked kernel: Triton on CUDA, tiles in torch elsewhere."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    rows.forget_gradients()
    heads = rows.hidden, rows.weight, None, rows.teacher_hidden, rows.teacher_weight, None
    with rows.bench.machine.autocast("bf16-mixed" if rows.mixed else "32-true"):
        divergence, _ = ChunkedDivergenceFunction.apply(*heads, 0.0)
    (divergence.sum() / len(rows.hidden)).backward()


def head(bench: Bench) -> Iterator[Result]:
    """Student and teacher of one width, float32: all objectives, and their memory."""
    rows = _equal_widths(bench)
    yield from _times(bench, rows, 1.10)
    yield from _memory(bench, rows, 300)


def other_ways(bench: Bench) -> Iterator[Result]:
    """The same rows: forward KL in other ways."""
    yield from _other_ways(bench, _equal_widths(bench))


def _equal_widths(bench: Bench) -> Rows:
    return random_rows(bench, *((64, 512, 32, 32) if bench.quick else (2048, 49_152, 576, 576)))


def wide_teacher(bench: Bench) -> Iterator[Result]:
    """A teacher of another width, float32: all objectives that need it."""
    rows = random_rows(bench, *((64, 512, 32, 96) if bench.quick else (2048, 49_152, 576, 2048)))
    yield from _times(bench, rows, 1.10, alone=False)


def cuda_head(bench: Bench) -> Iterator[Result]:
    """The vocabulary and widths of Qwen2.5 in bfloat16."""
    if not bench.machine.cuda:
        yield skipped("head of Qwen2.5's sizes in bfloat16", "needs CUDA")
        return
    sizes = (64, 512, 32, 96) if bench.quick else (8192, 151_936, 896, 3584)
    rows = random_rows(bench, *sizes, mixed=True)
    yield from _times(bench, rows, 1.5)
    yield from _memory(bench, rows, 1.5 * 1024)
    yield from _other_ways(bench, rows)


def _times(bench: Bench, rows: Rows, bound: float, alone: bool = True) -> Iterator[Result]:
    groups = [(True, group) for group in GROUPS] + ([(False, ALONE)] if alone else [])
    small = rows.first(max(16, len(rows.hidden) // 8))
    size = f"{len(rows.hidden):,} rows, H {rows.hidden.shape[1]} and {rows.teacher_hidden.shape[1]}"
    for teacher, group in groups:
        products = Products(rows, teacher)
        Products(small, teacher)()  # warm-up, as for the objectives on fewer rows
        ways: dict[str, Callable[[], float]] = {}
        for name, kinds in group.items():
            chunked(small, kinds)
            ways[name] = bench.clock(partial(chunked, rows, kinds))
        seconds = alternate({**ways, PRODUCTS: bench.clock(products)}, bench.repeats, warm_up=False)
        number = "four" if teacher else "three"
        for name in group:
            yield compared(
                f"{name}, {size}, against its {number} bare products", seconds[name], seconds[PRODUCTS], at_most(bound)
            )
        del products
        rows.forget_gradients()
        bench.machine.clear()


def _memory(bench: Bench, rows: Rows, bound: float) -> Iterator[Result]:
    """Extra memory of each objective, beside the two gradients; and whether more rows take more.

    The C library keeps some buffers of chunks for later, more or less of them from call to call: a quarter of the bound is granted.
    """
    few = rows.first(len(rows.hidden) // 4)
    taken: dict[str, list[float]] = {}
    for group in (*GROUPS, ALONE):
        for name, kinds in group.items():
            taken[name] = [_extra(bench, part, partial(chunked, part, kinds)) for part in (few, rows)]
    if any(math.isnan(size) for sizes in taken.values() for size in sizes):
        yield skipped("extra memory", "this system does not say how much a process uses")
        return
    worst = max(taken, key=lambda name: taken[name][1])
    note = ", ".join(f"{name} {sizes[1]:.0f}" for name, sizes in taken.items())
    gradients = f"and {rows.gradient_bytes / MB:.0f} MB for the gradients of rows and weight; largest of: {note}"
    yield limited(f"extra memory beside the gradients, {worst}", taken[worst][1], "MB", at_most(bound), gradients)
    steepest = max(taken, key=lambda name: taken[name][1] - taken[name][0])
    growth = taken[steepest][1] - taken[steepest][0]
    logits = 4 * (len(rows.hidden) - len(few.hidden)) * len(rows.weight) / MB
    yield limited(
        f"growth of it from {len(few.hidden):,} to {len(rows.hidden):,} rows, {steepest}", growth, "MB", at_most(bound / 4),
        f"their logits: {logits:.0f} MB for one model",
    )  # fmt: skip


def _extra(bench: Bench, rows: Rows, work: Callable[[], object]) -> float:
    """MB used at most while ``work`` runs, without the gradients that remain."""
    rows.forget_gradients()
    with PeakMemory(bench.machine) as peak:
        work()
    rows.forget_gradients()
    return (peak.extra - rows.gradient_bytes) / MB


def _other_ways(bench: Bench, rows: Rows) -> Iterator[Result]:
    """Forward KL in other ways, without a goal."""
    kernel = "TRL's chunked kernel"
    ways: dict[str, Callable[[], object]] = {
        "ours": partial(chunked, rows, (ForwardKL,)),
        "all logits at once (F.kl_div)": partial(whole, rows),
    }
    if installed():
        ways[kernel] = partial(trl_kernel, rows)
    extra = {name: _extra(bench, rows, way) for name, way in ways.items()}  # the warm-up
    seconds = alternate({name: bench.clock(way) for name, way in ways.items()}, bench.repeats, warm_up=False)
    rows.forget_gradients()
    ours = seconds.pop("ours")
    for name, peer in seconds.items():
        note = f"extra memory beside the gradients: {extra['ours']:.0f} MB, peer {extra[name]:.0f} MB"
        yield compared(f"ForwardKL against {name}", ours, peer, note=note)
    if not installed():
        yield skipped(f"ForwardKL against {kernel}", NOT_INSTALLED)
    products, at_once = Products(rows), Products(rows, chunk_rows=len(rows.hidden))
    seconds = alternate({"chunks": bench.clock(products), "whole": bench.clock(at_once)}, 1)
    note = f"with all {len(rows.hidden):,} rows at once: {seconds['whole'][0]:.3g} s"
    yield measured(f"the four products, {products.chunk} rows at a time", seconds["chunks"][0], note=note)
