"""P8: time and counted work against the number of new tokens, the vocabulary, the rows and the batch, on tiny models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.head import chunked, random_rows
from benchmarks.measure import Bench, counted
from benchmarks.models import Pair, causal_lm, random_prompts, tiny_config
from benchmarks.results import Result, measured
from benchmarks.rollouts import Rollouts
from lit_distill.objectives import ForwardKL
from lit_distill.teachers import FrozenTeacher


class Point(NamedTuple):
    """One size: how long, and how much work."""

    size: int
    seconds: float
    work: float


class Case(NamedTuple):
    """What is varied, and the unit of the work that is counted."""

    what: str
    unit: str
    sizes: Sequence[int]
    measure: Callable[[Bench, int], Point]


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the line through log sizes and log values: 1 if values grow as sizes do, 0 if they do not grow."""
    slope, _ = statistics.linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values])
    return slope


def _doubled(first: int) -> list[int]:
    return [first * 2**power for power in range(4)]


def scaling(bench: Bench) -> Iterator[Result]:
    """Four sizes of each; the plots go to the folder of ``--plots``."""
    tokens, logits = "tokens through both bodies", "logits of both models"
    cases = [
        Case("new tokens T", tokens, _doubled(bench.size(4, 32, 32)), _tokens),
        Case("vocabulary V", logits, _doubled(bench.size(128, 8192, 16_384)), _vocabulary),
        Case("rows", logits, _doubled(bench.size(16, 256, 2048)), _rows),
        Case("batch", tokens, _doubled(bench.size(1, 4, 16)), _batch),
    ]
    found: list[tuple[Case, list[Point]]] = []
    for case in cases:
        points = [case.measure(bench, size) for size in case.sizes]
        found.append((case, points))
        sizes = [point.size for point in points]
        time, work = (exponent(sizes, [getattr(point, name) for point in points]) for name in ("seconds", "work"))
        each = ", ".join(f"{point.size:,}: {point.seconds:.3g} s, {point.work:,.0f}" for point in points)
        note = f"seconds and {case.unit} by {case.what}: {each}; time grows as its power {time:.2f}, work as {work:.2f}"
        yield measured(f"time at {case.what} = {sizes[-1]:,}", points[-1].seconds, note=note)
    if bench.plots is not None:
        _plot(bench, found)


def _point(bench: Bench, size: int, work: Callable[[], object], amount: float) -> Point:
    work()
    timed = bench.clock(work)
    return Point(size, statistics.median(timed() for _ in range(bench.repeats)), amount)


def _rollouts(bench: Bench, size: int, rows: int, new_tokens: int) -> Point:
    width = bench.size(32, 128, 256)
    models = [causal_lm(bench, tiny_config(layers, 512, width), layers) for layers in (2, 4)]
    pair = Pair(models[0], FrozenTeacher(models[1]))
    ways = Rollouts(bench, pair, random_prompts(bench, pair.vocabulary_size, rows, 16), new_tokens)
    with counted(pair.models) as counts:
        ways.mixed()
    return _point(bench, size, ways.mixed, sum(work.tokens for work in counts.models.values()))


def _tokens(bench: Bench, size: int) -> Point:
    return _rollouts(bench, size, bench.size(2, 8, 64), size)


def _batch(bench: Bench, size: int) -> Point:
    return _rollouts(bench, size, size, bench.size(8, 64, 64))


def _head(bench: Bench, size: int, rows: int, vocabulary: int) -> Point:
    parts = random_rows(bench, rows, vocabulary, 64, 64)
    return _point(bench, size, partial(chunked, parts, (ForwardKL,)), 2 * rows * vocabulary)


def _vocabulary(bench: Bench, size: int) -> Point:
    return _head(bench, size, bench.size(64, 512, 4096), size)


def _rows(bench: Bench, size: int) -> Point:
    return _head(bench, size, size, bench.size(256, 8192, 32_768))


def _plot(bench: Bench, found: Sequence[tuple[Case, Sequence[Point]]]) -> None:
    """Write ``scaling.png`` and ``scaling.svg``: a panel for each case, seconds and work on logarithmic axes of the same span."""
    from matplotlib.figure import Figure

    assert bench.plots is not None
    bench.plots.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, (case, points) in zip(figure.subplots(2, 2).flat, found, strict=True):
        sizes = [point.size for point in points]
        seconds, work = ([getattr(point, name) for point in points] for name in ("seconds", "work"))
        span = 1.2 * max(max(values) / min(values) for values in (seconds, work))
        axes.set_xlabel(case.what)
        for side, values, label, style, digits in (
            (axes, seconds, "seconds", "o-", ".2g"),
            (axes.twinx(), work, case.unit, "s--", ",.0f"),
        ):
            color = "tab:blue" if side is axes else "tab:orange"
            side.loglog(sizes, values, style, color=color)
            side.set_ylabel(label, color=color)
            side.set_ylim(min(values) / 1.1, min(values) / 1.1 * span)
            side.set_yticks(values, [f"{value:{digits}}" for value in values])
            side.set_xticks(sizes, [f"{size:,}" for size in sizes])
            side.minorticks_off()
    for kind in ("png", "svg"):
        figure.savefig(bench.plots / f"scaling.{kind}")
