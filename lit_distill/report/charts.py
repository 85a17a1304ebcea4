"""The charts of a report: curves, bars and reliability diagrams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lit_distill.report.metrics import number
from lit_distill.report.svg import WIDTH, Drawing, Scale, axes, dash_of, nice_ticks, shortened, style_of

MARKED = 14
"""A curve of at most so many points shows each."""
MOST_BANDS = 3
"""More bands over each other hide the lines."""


@dataclass(frozen=True)
class Curve:
    """A line in a chart, with a band around it where it is a mean."""

    label: str
    style: int
    points: list[tuple[float, float]]
    band: list[tuple[float, float, float]]
    """x, lowest, highest; empty for a single run."""


def mean_curve(label: str, style: int, curves: Sequence[Sequence[tuple[float, float]]]) -> Curve:
    """The mean of several curves where all of them have a point, with the band from the lowest to the highest."""
    if len(curves) == 1:
        return Curve(label, style, sorted(curves[0]), [])
    tables = [dict(curve) for curve in curves]
    shared = sorted(x for x in tables[0] if all(x in table for table in tables))
    found = [(x, [table[x] for table in tables]) for x in shared]
    return Curve(label, style, [(x, fmean(v)) for x, v in found], [(x, min(v), max(v)) for x, v in found])


def line_chart(title: str, curves: Sequence[Curve], x_label: str, include: Sequence[float] = ()) -> Drawing:
    """Curves over a common x.

    Args:
        title: names the image.
        curves: at least one with a point.
        x_label: below the axis.
        include: values that the vertical axis must reach too, such as 0 or the largest of a neighbouring chart.
    """
    drawn = [curve for curve in curves if curve.points]
    told = [
        f"{c.label}: {c.points[0][1]:.4g} at {c.points[0][0]:g} to {c.points[-1][1]:.4g} at {c.points[-1][0]:g}"
        for c in drawn
    ]
    drawing = Drawing(232, title, f"Over {x_label}. {'; '.join(told)}.")
    xs = [x for curve in drawn for x, _ in curve.points]
    banded = [curve for curve in drawn if len(curve.band) > 1] if len(drawn) <= MOST_BANDS else []
    ys = [y for curve in drawn for _, y in curve.points] + [y for c in banded for _, *ends in c.band for y in ends]
    x, y = Scale(*scatter_rows(xs, 0.0), 46, WIDTH - 12), Scale(*scatter_rows([*ys, *include], 0.05), 192, 8)
    axes(drawing, x, y, x_label)
    for curve in banded:
        around = [(x(at), y(least)) for at, least, _ in curve.band] + [
            (x(at), y(most)) for at, _, most in curve.band[::-1]
        ]
        drawing.path(around, f"band s{style_of(curve.style)}")
    for curve in drawn:
        places = [(x(at), y(value)) for at, value in curve.points]
        drawing.path(places, f"line s{style_of(curve.style)}", stroke_dasharray=dash_of(curve.style))
        every = 1 if len(places) <= MARKED else max(1, len(places) // 6)
        for place in places[::every]:
            drawing.marker(*place, curve.style, 3)
    return drawing


def scatter_rows(values: Sequence[float], margin: float) -> tuple[float, float]:
    """From the lowest to the highest with a margin, but not across 0."""
    low, high = min(values), max(values)
    if low == high:
        return low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    room = margin * (high - low)
    return (low if low == 0 else low - room), (high if high == 0 else high + room)


@dataclass(frozen=True)
class Bar:
    """One bar with what it says."""

    label: str
    style: int
    value: float
    text: str


def bar_chart(title: str, groups: Sequence[tuple[str, Sequence[Bar]]], full: float = 0.0) -> Drawing:
    """Horizontal bars from 0, each with its label and its value, under the heads of their groups.

    Args:
        title: names the image.
        groups: heads and bars.
        full: the value of a bar of the whole width; by default, the largest.
    """
    height = sum(30 + 32 * len(bars) for _, bars in groups)
    described = "; ".join(f"{head}: {', '.join(f'{bar.label} {bar.text}' for bar in bars)}" for head, bars in groups)
    drawing = Drawing(height, title, f"{described}.")
    largest = max([bar.value for _, bars in groups for bar in bars], default=0.0)
    length = Scale(0, full or largest or 1.0, 0, WIDTH - 4)
    top = 0.0
    for head, bars in groups:
        drawing.text(0, top + 15, head, "head")
        top += 20
        for bar in bars:
            drawing.text(0, top + 12, shortened(bar.label, 46))
            drawing.text(WIDTH - 4, top + 12, bar.text, "value", "end")
            drawing.add("rect", "track", x=0, y=top + 17, width=WIDTH - 4, height=7, rx=2)
            if bar.value > 0:
                drawing.add(
                    "rect",
                    f"fill s{style_of(bar.style)}",
                    x=0,
                    y=top + 17,
                    width=max(1.0, length(bar.value)),
                    height=7,
                    rx=2,
                )
            top += 32
        top += 10
    return drawing


def reliability_diagram(title: str, bins: Sequence[dict[str, Any]], style: int) -> Drawing:
    """Accuracy over confidence in bins, with the diagonal of a calibrated model and each bin's share of the predictions.

    Args:
        title: names the image.
        bins: ``low``, ``high``, ``confidence``, ``accuracy`` and ``count`` of each; bins without predictions may be missing.
        style: of the bars.
    """
    used = [one for one in bins if one["count"]]
    total = sum(one["count"] for one in used)
    told = [
        f"confidence {one['confidence']:.2f}: {100 * one['accuracy']:.0f} % right, {one['count']} predictions"
        for one in used
    ]
    drawing = Drawing(330, title, f"{'; '.join(told)}.", 300)
    x, y = Scale(0, 1, 40, 288), Scale(0, 1, 236, 12)
    axes(drawing, x, y, None)
    kind = style_of(style)
    for one in used:
        left, width = x(one["low"]), x(one["high"]) - x(one["low"])
        drawing.add(
            "rect",
            f"fill soft s{kind}",
            x=left + 0.5,
            y=y(one["accuracy"]),
            width=width - 1,
            height=236 - y(one["accuracy"]),
        )
    drawing.path([(x(0), y(0)), (x(1), y(1))], "diagonal", stroke_dasharray="5 4")
    for one in used:
        place = x(one["confidence"]), y(one["accuracy"])
        drawing.path([place, (place[0], y(one["confidence"]))], "gap")
        drawing.marker(*place, style, 3.6)
    most = max([one["count"] / total for one in used], default=1.0)
    share = Scale(0, most, 290, 250)
    for one in used:
        at, width = share(one["count"] / total), x(one["high"]) - x(one["low"])
        drawing.add("rect", "count", x=x(one["low"]) + 0.5, y=at, width=width - 1, height=290 - at)
    drawing.path([(40, 290), (288, 290)], "axis")
    drawing.text(34, 258, f"{number(100 * most, 0)} %", anchor="end")
    drawing.text(34, 294, "0", anchor="end")
    for step in nice_ticks(0, 1):
        drawing.text(x(step), 306, f"{step:g}", anchor="middle")
    drawing.text(164, 322, "confidence", "label", "middle")
    return drawing


def swatch(style: int) -> Drawing:
    """What a legend shows of a line."""
    drawing = Drawing(14, "line", "how it is drawn", 34)
    drawing.path([(1, 7), (33, 7)], f"line s{style_of(style)}", stroke_dasharray=dash_of(style))
    drawing.marker(17, 7, style, 3.4)
    return drawing
