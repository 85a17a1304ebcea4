"""Axes and marks as inline SVG: well-formed by construction, coloured by the page's style sheet."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from lit_distill.report.metrics import MINUS

WIDTH = 360
"""Of every chart in its own units; the page shows it at about one pixel each, so that its text stays readable."""
NUM_STYLES = 6
"""How many colours, markers and dashes of students there are; 0 is the teacher's."""
DASHES = ("6 4", "", "8 3 2 3", "3 3", "", "10 4", "5 2")
UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]")


def style_of(index: int) -> int:
    """The style of column ``index``, with the teacher's 0 kept for the teacher."""
    return 0 if index == 0 else (index - 1) % NUM_STYLES + 1


def dash_of(index: int) -> str:
    """The dashes of column ``index``; dots, once the colours are used up."""
    return "1.5 3" if index > NUM_STYLES else DASHES[style_of(index)] or "none"


def printable(text: str) -> str:
    """``text`` with a replacement character for what XML and HTML cannot hold, and for what would reverse the text around it."""
    return UNPRINTABLE.sub("\ufffd", text)


def shortened(text: str, length: int) -> str:
    """``text`` with its middle left out where it is longer than ``length``, since SVG does not break lines."""
    keep = (length - 1) // 2
    return text if len(text) <= length else f"{text[:keep]}…{text[-keep:]}"


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, linearly."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of ``value``."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most ``most`` round numbers in [low, high], low < high, at equal distances of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power * factor for factor in (1, 2, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [index * step for index in range(first, last + 1)]
    raise AssertionError("steps of more than a sixth of the range are at most six")


def tick_label(value: float) -> str:
    """Short: ``0.25``, ``1.5``, ``20k``."""
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k".replace("-", MINUS)
    return f"{round(value, 10):g}".replace("-", MINUS)


class Drawing:
    """An SVG image that a screen reader can name and describe.

    Args:
        height: in the units of `WIDTH`.
        title: what it is.
        description: what it shows, for those who cannot see it.
        width: by default `WIDTH`.
    """

    def __init__(self, height: float, title: str, description: str, width: float = WIDTH) -> None:
        self.root = ET.Element(
            "svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width:g} {height:g}", "role": "img"}
        )
        self.add("title").text = printable(title)
        self.add("desc").text = printable(description)

    def add(self, tag: str, css: str = "", **attributes: float | str) -> ET.Element:
        """An element at the end, so above all others."""
        values = {key.replace("_", "-"): _attribute(value) for key, value in attributes.items()}
        return ET.SubElement(self.root, tag, {"class": css, **values} if css else values)

    def text(self, x: float, y: float, text: str, css: str = "", anchor: str = "start", **more: float | str) -> None:
        """A line of text; ``anchor`` is start, middle or end."""
        self.add("text", css, x=x, y=y, text_anchor=anchor, **more).text = printable(text)

    def path(self, points: Sequence[tuple[float, float]], css: str, **attributes: float | str) -> None:
        """A line through ``points``."""
        steps = " ".join(f"{'L' if index else 'M'}{x:.1f} {y:.1f}" for index, (x, y) in enumerate(points))
        self.add("path", css, d=steps, **attributes)

    def marker(self, x: float, y: float, style: int, size: float = 3.4) -> None:
        """A point, in the shape and colour of ``style``."""
        kind = style_of(style)
        if kind in (1, 5):
            self.add("circle", f"mark s{kind}", cx=x, cy=y, r=size)
            return
        shapes = {
            0: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
            2: ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
            3: ((0, -1.3), (1.2, 1), (-1.2, 1)),
            4: ((0, 1.3), (1.2, -1), (-1.2, -1)),
            6: ((-1.4, -0.6), (1.4, -0.6), (1.4, 0.6), (-1.4, 0.6)),
        }
        points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in shapes[kind])
        self.add("polygon", f"mark s{kind}", points=points)

    def __str__(self) -> str:
        return ET.tostring(self.root, encoding="unicode")


def axes(drawing: Drawing, x: Scale, y: Scale, x_label: str | None) -> None:
    """Grid lines with numbers, and the horizontal axis with its name; without a name only its line."""
    for value in nice_ticks(y.low, y.high):
        drawing.path([(x.start, y(value)), (x.end, y(value))], "axis" if value == 0 else "grid")
        drawing.text(x.start - 6, y(value) + 4, tick_label(value), anchor="end")
    drawing.path([(x.start, y.start), (x.end, y.start)], "axis")
    if x_label is not None:
        for value in nice_ticks(x.low, x.high):
            drawing.path([(x(value), y.start), (x(value), y.start + 4)], "axis")
            anchor = "end" if x(value) > x.end - 8 else "middle"
            drawing.text(x(value), y.start + 16, tick_label(value), anchor=anchor)
        drawing.text((x.start + x.end) / 2, y.start + 31, x_label, "label", "middle")


def _attribute(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
