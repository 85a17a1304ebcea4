"""Figures have the size of what they show, and stand on a page in the colours of its theme, apart from each other."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from reports import BINS, parsed

from lit_distill.report import figures
from lit_distill.report.curves import mean_curve
from lit_distill.report.figures import (
    Bar,
    Curve,
    Reliability,
    draw_accumulated_error,
    draw_bars,
    draw_curves,
    draw_reliability,
    make_figure,
    style_of,
    svg,
)

CSS = Path(figures.__file__).with_name("style.css").read_text()


def themes() -> list[dict[str, str]]:
    """The colours of the light and of the dark page, by name."""
    return [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)]


def test_the_mean_curve_is_over_the_points_that_all_have() -> None:
    curve = mean_curve("x", 1, [[(1, 2.0), (2, 4.0), (3, 9.0)], [(1, 4.0), (2, 8.0)]])
    assert curve.points == [(1, 3.0), (2, 6.0)]
    assert curve.band == [(1, 2.0, 4.0), (2, 4.0, 8.0)]


def test_a_curve_goes_through_its_points_inside_its_band_and_the_axis_reaches_what_it_must() -> None:
    curve = mean_curve("x", 1, [[(1, 2.0), (2, 4.0)], [(1, 4.0), (2, 8.0)]])
    figure = make_figure(
        lambda figure: draw_curves(figure.subplots(), [curve, Curve("none", 2, [])], "step", include=[0, 20])
    )
    (axes,) = figure.axes
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[1, 3], [2, 6]]
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert (corners.min(), corners.max()) == (1, 8)
    low, high = axes.get_ylim()
    assert low <= 0
    assert high >= 20
    assert axes.get_xlabel() == "step"


def test_bars_are_as_long_as_their_values() -> None:
    bars = [("g", [Bar(0, 25.0, "25"), Bar(1, 100.0, "100")]), ("h", [Bar(1, 0.0, "0")])]
    (axes,) = make_figure(lambda figure: draw_bars(figure.subplots(), bars, full=100.0)).axes
    tracks, values = axes.containers
    assert [bar.get_width() for bar in values] == [25, 100, 0]
    assert [bar.get_width() for bar in tracks] == [100, 100, 100]
    assert axes.get_xlim() == (0, 100)
    assert [to_hex(bar.get_facecolor()) for bar in values] == [style_of(style)[0] for style in (0, 1, 1)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["g", "h"]
    assert {"25", "100", "0"} <= {text.get_text() for text in axes.texts}


def test_a_reliability_diagram_has_a_bar_of_the_accuracy_and_one_of_the_share_for_each_bin() -> None:
    models = [Reliability("", 1, [*BINS, {**BINS[0], "count": 0}])]
    above, below = make_figure(lambda figure: draw_reliability(figure, models)).axes
    assert [bar.get_height() for bar in above.patches] == [0.25, 0.75]
    assert [bar.get_x() for bar in above.patches] == [0, 0.5]
    diagonal, points = above.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert points.get_xydata().tolist() == [[0.4, 0.25], [0.9, 0.75]]
    gaps = [path.vertices.tolist() for path in above.collections[0].get_paths()]
    assert gaps == [[[0.4, 0.4], [0.4, 0.25]], [[0.9, 0.9], [0.9, 0.75]]]
    assert [bar.get_height() for bar in below.patches] == [25, 75]
    assert below.get_xlabel() == "confidence (16 predictions)"
    assert above.get_legend() is None


def test_accumulated_errors_are_drawn_where_they_are_finite() -> None:
    excess = Curve("ExAccErr", 1, [(1, float("nan")), (2, float("inf")), (3, 12.5)])
    own, teachers = Curve("own", 1, [(1, 0.5), (2, 0.9)]), Curve("teacher's", 0, [(1, 0.0), (2, 0.8)])
    figure = make_figure(lambda figure: draw_accumulated_error(figure, excess, own, teachers))
    above, below = figure.axes
    assert np.isfinite([*above.get_ylim(), *below.get_ylim()]).all()
    assert [text.get_text() for text in below.get_legend().get_texts()] == ["own", "teacher's"]
    assert [line.get_xydata().tolist() for line in below.lines] == [[[1, 0.5], [2, 0.9]], [[1, 0], [2, 0.8]]]
    assert "nan" not in svg(figure, "", 1)


@pytest.mark.parametrize("points", [[(1.0, 2.0), (2.0, 2.0)], [(0.0, 0.0)], [(5.0, -1.0)]])
def test_a_flat_curve_and_a_lone_point_can_be_drawn(points) -> None:
    figure = make_figure(lambda figure: draw_curves(figure.subplots(), [Curve("x", 7, points)], "step"))
    assert "nan" not in svg(figure, "", 1)


def draw_some(figure: Figure) -> None:
    draw_reliability(figure, [Reliability("student", 1, BINS), Reliability("teacher", 0, BINS)], "$mood$")


def test_the_same_figure_is_always_the_same_text_and_two_on_a_page_share_no_id() -> None:
    first, again, second = (svg(make_figure(draw_some), "what it shows", number) for number in (1, 1, 2))
    assert first == again
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for text, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= own


def test_a_figure_on_the_page_has_its_theme_s_colours_alone_and_says_what_it_is() -> None:
    text = svg(make_figure(draw_some), "what it &amp; you see", 1)
    root = parsed(text)
    assert (root.get("role"), root.get("aria-label")) == ("img", "what it & you see")
    assert not re.findall(r"[:\"]\s*#[0-9a-f]{3,6}\b", text)
    used = set(re.findall(r"var\(--(\w+)\)", text))
    assert {"s0", "s1", "muted", "rule"} <= used <= set(themes()[0])
    assert "$mood$" in "".join(root.itertext())  # the name of a task is no formula


def test_figures_in_tensorboard_have_the_colours_of_the_light_page() -> None:
    assert {name: color for color, name in figures.VARIABLES.items()}.items() <= themes()[0].items()
    assert to_hex(make_figure(draw_some).get_facecolor()) == themes()[0]["ground"]


def test_styles_never_run_out_and_the_teacher_keeps_its_own() -> None:
    assert len({style_of(index) for index in range(13)}) == 13
    assert style_of(0)[0] not in {style_of(index)[0] for index in range(1, 20)}


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_the_ground(theme) -> None:
    colours = themes()[theme]
    assert set(colours) == {"ground", "raised", "text", "muted", "rule", "best", "link", *(f"s{n}" for n in range(7))}
    for name, colour in colours.items():
        for ground in ("ground", "raised"):
            low, high = sorted((luminance(colour), luminance(colours[ground])))
            contrast = (high + 0.05) / (low + 0.05)
            if name in ("text", "muted", "best", "link"):
                assert contrast >= 4.5, name
            elif name.startswith("s"):
                assert contrast >= 3, name
    first = [luminance(colours[f"s{n}"]) + 0.05 for n in range(4)]
    assert all(max(pair) / min(pair) > 1.12 for pair in combinations(first, 2))  # also without colour
