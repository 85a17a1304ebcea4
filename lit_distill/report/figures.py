"""All drawings, with matplotlib: in TensorBoard in their own colours, on the page as SVG in the colours of its theme."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Dashes = tuple[float, Sequence[float]] | str

TEXT, MUTED, RULE, GROUND, RAISED = "#1b1f24", "#57606a", "#d5dae0", "#ffffff", "#f6f7f9"
STYLES: tuple[tuple[str, str, Dashes], ...] = (  # of the teacher, then of the students; their lightness differs too
    ("#c2540a", "s", (0, (6, 4))),
    ("#12407f", "o", "-"),
    ("#168f7f", "D", (0, (8, 3, 2, 3))),
    ("#8b3fc6", "^", (0, (3, 3))),
    ("#7a6a00", "v", "-"),
    ("#b3245c", "o", (0, (10, 4))),
    ("#5f6b76", "P", (0, (5, 2))),
)
VARIABLES = {TEXT: "text", MUTED: "muted", RULE: "rule", GROUND: "ground", RAISED: "raised"}
VARIABLES |= {color: f"s{index}" for index, (color, _, _) in enumerate(STYLES)}
"""Colour → its name in the style sheet of the page."""
BIN = ("low", "high", "confidence", "accuracy", "count")
MARKED = 14
"""A curve of at most so many points shows each."""
MOST_BANDS = 3
"""More bands over each other hide the lines."""
LOOK: Any = (  # what is set where in matplotlib; Any, since its types list the names of one release
    {"font.size": 12, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "text.color": TEXT}
    | {"axes.edgecolor": MUTED, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED}
    | {"axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.left": False}
    | {"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": RULE, "grid.linewidth": 0.7}
    | {"lines.linewidth": 2, "lines.markersize": 7, "lines.scale_dashes": False, "legend.frameon": False}
    | {"axes.xmargin": 0.02, "axes.titlesize": "medium", "svg.hashsalt": "lit-distill", "svg.fonttype": "none"}
)


@dataclass(frozen=True)
class Curve:
    """A line, with a band around it where it is a mean."""

    label: str
    style: int
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    """x, lowest, highest."""


class Reliability(NamedTuple):
    """What a reliability diagram shows of a model."""

    label: str
    """In the legend; the empty string stands in none."""
    style: int
    bins: Sequence[Mapping[str, Any]]
    """Each with the keys of `BIN`; those without predictions may be missing."""


class Bar(NamedTuple):
    """A bar with what it says."""

    style: int
    value: float
    text: str


def style_of(index: int) -> tuple[str, str, Dashes]:
    """Colour, marker and dashes of column ``index``; 0 is the teacher's, and where colours come again, lines are dotted."""
    color, marker, dashes = STYLES[(index - 1) % (len(STYLES) - 1) + 1 if index else 0]
    return color, marker, (0, (1.5, 3)) if index >= len(STYLES) else dashes


def draw_curves(
    axes: Axes, curves: Iterable[Curve], x_label: str, y_label: str = "", include: Sequence[float] = ()
) -> None:
    """Draw curves over a common x on empty axes; the vertical axis reaches the values in ``include`` too."""
    drawn = [curve for curve in curves if curve.points]
    for curve in drawn:
        color, marker, dashes = style_of(curve.style)
        x, y = zip(*curve.points, strict=True)
        every = 1 if len(x) <= MARKED else len(x) // 6
        look: Any = {"color": color, "linestyle": dashes, "marker": marker, "markeredgecolor": GROUND}
        axes.plot(x, y, **look, markevery=every, label=curve.label, clip_on=False)
        if curve.band and len(drawn) <= MOST_BANDS:
            x, lowest, highest = zip(*curve.band, strict=True)
            axes.fill_between(x, lowest, highest, color=color, alpha=0.18, linewidth=0)
        axes.update_datalim([(curve.points[0][0], value) for value in include])
    axes.autoscale_view()
    axes.locator_params("x", nbins=6, integer=True)
    axes.locator_params("y", nbins=6)
    axes.set(xlabel=x_label, ylabel=y_label)


def draw_accumulated_error(figure: Figure, excess: Curve, own: Curve, teachers: Curve) -> None:
    """Draw the curves of exposure bias over the length l: ExAccErr above, R and l·ε below."""
    above, below = figure.subplots(2, 1, sharex=True)
    draw_curves(above, [excess], "", "ExAccErr(l), %", include=[0.0])
    draw_curves(below, [own, teachers], "l, response tokens", "accumulated KL(p‖q), nats", include=[0.0])
    below.legend()


def draw_reliability(figure: Figure, models: Sequence[Reliability], title: str = "") -> None:
    """Draw accuracy over confidence, with the diagonal of a calibrated model, and below it the share of predictions in each bin.

    Bars show the accuracy of the first model's bins; points show the mean confidence and accuracy of each model's bins, with
    a line to the diagonal.
    """
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    above.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (5, 4)))
    total = 0
    for index, model in enumerate(models):
        used = [[float(one[key]) for key in BIN] for one in model.bins if one["count"]]
        low, high, confidence, accuracy, count = np.array(used).reshape(-1, len(BIN)).T
        total = max(total, int(count.sum()))
        color, marker, _ = style_of(model.style)
        if index == 0:
            above.bar(low, accuracy, high - low, align="edge", color=color, alpha=0.3, edgecolor=GROUND)
        above.vlines(confidence, confidence, accuracy, color=color, linewidth=1)
        look: Any = {"color": color, "marker": marker, "linestyle": "none", "markeredgecolor": GROUND}
        above.plot(confidence, accuracy, **look, label=model.label or None, clip_on=False, zorder=3)
        width, share = (high - low) / len(models), 100 * count / count.sum()
        below.bar(low + index * width, share, width, align="edge", color=color, edgecolor=GROUND, linewidth=0.5)
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    above.set_title(title, parse_math=False)
    above.tick_params(bottom=False)
    below.set(xlabel=f"confidence ({total:,} predictions)", ylabel="% of them")
    if any(model.label for model in models):
        above.legend(loc="upper left", fontsize="small")


def draw_bars(axes: Axes, groups: Sequence[tuple[str, Sequence[Bar]]], full: float = 0.0) -> None:
    """Draw horizontal bars from 0 in groups with heads on empty axes; ``full`` is the value of a bar of the whole width."""
    bars = [bar for _, bars in groups for bar in bars]
    full = full or max(bar.value for bar in bars) or 1.0
    places: list[float] = []
    middles = []
    for _, members in groups:
        start = places[-1] + 1.6 if places else 0.0
        places += [start + index for index in range(len(members))]
        middles.append((start + places[-1]) / 2)
    track = axes.barh(places, full, color=RAISED)
    axes.barh(places, [bar.value for bar in bars], color=[style_of(bar.style)[0] for bar in bars])
    axes.bar_label(track, [bar.text for bar in bars], padding=4)
    axes.set_yticks(middles, [head for head, _ in groups], parse_math=False)
    axes.set(xlim=(0, full), ylim=(places[-1] + 0.5, -0.5))
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.xaxis.set_visible(False)


def draw_swatch(axes: Axes, style: int) -> None:
    """Draw what a legend shows of a line."""
    color, marker, dashes = style_of(style)
    axes.axis("off")
    axes.plot([0, 1, 2], [0, 0, 0], color=color, linestyle=dashes, marker=marker, markevery=[1], markeredgecolor=GROUND)


def make_figure(draw: Callable[[Figure], None], width: float = 432, height: float = 360) -> Figure:
    """A figure of the given size in points, drawn by ``draw`` in the look of the report, outside of pyplot's state."""
    import matplotlib as mpl  # slow to import
    from matplotlib.figure import Figure

    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(width / 72, height / 72), dpi=100, layout="constrained")
        draw(figure)
    return figure


def svg(figure: Figure, alt: str, number: int) -> str:
    """The figure as an ``<svg>`` element to stand in an HTML page, always the same for the same figure.

    Args:
        figure: from `make_figure`.
        alt: what it shows, for those who cannot see it; escaped already.
        number: of the figure on its page; keeps its ids apart from those of other figures.
    """
    import matplotlib as mpl

    out = StringIO()
    with mpl.rc_context(LOOK):
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = out.getvalue()
    view = re.search(r'viewBox="[^"]*"', text)
    assert view, "matplotlib has written no viewBox"
    body = text[text.index("<defs>") :]  # without the head of a file, and without a size: the page scales it
    body = re.sub(r"\s*<style.*?</style>", "", body, count=1, flags=re.DOTALL)  # holds for the whole page
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>f{number}-", body)  # see `renumbered`
    body = re.sub("|".join(VARIABLES), lambda found: f"var(--{VARIABLES[found[0]]})", body)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {view[0]}'
    return f'{head} role="img" aria-label="{alt}">{body}'


def renumbered(drawing: str, number: int) -> str:
    """The same figure, from `svg`, with another number, to stand on the page once more."""
    return re.sub(r'( id="|href="#|url\(#)f\d+-', rf"\g<1>f{number}-", drawing)
