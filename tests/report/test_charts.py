"""Charts have the size of what they show, and their colours can be told apart."""

from __future__ import annotations

from itertools import combinations

import pytest
from reports import BINS, parsed

from lit_distill.report.charts import Bar, Curve, bar_chart, line_chart, mean_curve, reliability_diagram
from lit_distill.report.style import DARK, LIGHT
from lit_distill.report.svg import nice_ticks


def test_the_mean_curve_is_over_the_points_that_all_have() -> None:
    curve = mean_curve("x", 1, [[(1, 2.0), (2, 4.0), (3, 9.0)], [(1, 4.0), (2, 8.0)]])
    assert curve.points == [(1, 3.0), (2, 6.0)]
    assert curve.band == [(1, 2.0, 4.0), (2, 4.0, 8.0)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.1, 0.11), (-3, 1e6), (1e-9, 2e-9), (17, 1234)])
def test_ticks_are_few_round_and_inside(low, high) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-6 * (high - low) <= tick <= high + 1e-6 * (high - low) for tick in ticks)
    step = ticks[1] - ticks[0]
    assert f"{step:.0e}"[0] in "125"


def test_bars_are_as_long_as_their_values() -> None:
    root = parsed(bar_chart("t", [("g", [Bar("a", 0, 25.0, "25"), Bar("b", 1, 100.0, "100")])], full=100.0))
    widths = [
        float(rect.get("width"))
        for rect in root.iter("{http://www.w3.org/2000/svg}rect")
        if "fill" in rect.get("class")
    ]
    assert widths[0] / widths[1] == pytest.approx(0.25, abs=1e-3)


def test_a_reliability_diagram_has_a_bar_of_the_accuracy_for_each_bin() -> None:
    root = parsed(reliability_diagram("t", [*BINS, {**BINS[0], "count": 0}], 1))
    rects = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    heights = [float(rect.get("height")) for rect in rects if "soft" in rect.get("class")]
    shares = [float(rect.get("height")) for rect in rects if rect.get("class") == "count"]
    assert heights[0] / heights[1] == pytest.approx(0.25 / 0.75, rel=1e-2)
    assert shares[0] / shares[1] == pytest.approx(4 / 12, rel=2e-2)


def test_a_flat_curve_and_a_lone_point_can_be_drawn() -> None:
    for points in ([(1.0, 2.0), (2.0, 2.0)], [(0.0, 0.0)], [(5.0, -1.0)]):
        parsed(line_chart("t", [Curve("x", 7, points, [])], "step"))


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_the_ground(colours) -> None:
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
