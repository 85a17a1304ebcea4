"""The course of a training, out of the `metrics.csv` that it has written."""

from __future__ import annotations

import csv
import math
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

NAMES = (
    "train/loss",
    "val/loss",
    "val/perplexity",
    "val/forward_kl",
    "val/reverse_kl",
    "val/rouge_l",
    "val/exact_match",
    "val/ece",
    "rollout/reward",
    "rollout/reverse_kl_k1",
)
MOST_POINTS = 240

Curves = dict[str, dict[str, list[Any]]]


def read_curves(path: Path) -> Curves:
    """``{name: {"steps": […], "values": […]}}`` of what is worth a chart; nothing where there is no file.

    A curve of more than 240 points is thinned to the means of as many equal stretches, each at its mean step.
    """
    if not path.is_file():
        return {}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if (step := _number(row.get("step"))) is None:
                continue
            for name in NAMES:
                if (value := _number(row.get(name))) is not None:
                    found[name].append((step, value))
    thinned = {name: _thinned(points) for name, points in found.items() if points}
    return {
        name: {"steps": [s for s, _ in points], "values": [v for _, v in points]} for name, points in thinned.items()
    }


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    points = sorted(dict(points).items())  # a step that a resumed run has logged again counts once
    if len(points) <= MOST_POINTS:
        return points
    stretches = groupby(enumerate(points), key=lambda item: item[0] * MOST_POINTS // len(points))
    chunks = [[point for _, point in stretch] for _, stretch in stretches]
    return [(fmean(step for step, _ in chunk), fmean(value for _, value in chunk)) for chunk in chunks]


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:  # a line that was cut when the run was killed
        return None
    return value if math.isfinite(value) else None
