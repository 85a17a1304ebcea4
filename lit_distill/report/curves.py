"""The course of a training, out of its `metrics.csv`, and the mean course of several."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from lit_distill.report.figures import Curve

TRAINING = {
    "train/loss": "Training loss",
    "val/loss": "Validation loss",
    "val/perplexity": "Validation perplexity",
    "val/forward_kl": "Validation KL(teacher ‖ student), nats/token",
    "val/reverse_kl": "Validation KL(student ‖ teacher), nats/token",
    "val/rouge_l": "Validation ROUGE-L, %",
    "val/exact_match": "Validation exact match, %",
    "val/ece": "Validation ECE of next tokens",
    "val/pass_at_1": "Validation pass@1 of sampled responses, %",
    "val/pass_at_8": "Validation pass@8 of sampled responses, %",
    "val/sampled_length": "Length of sampled responses, tokens",
    "val/on_policy_reverse_kl": "Reverse KL along sampled responses, nats/token",
    "val/on_policy_student_entropy": "Student's entropy along sampled responses, nats",
    "val/top_k_overlap": "Overlap of both models' most probable tokens",
    "rollout/reward": "Reward of rollouts, nats/token",
    "rollout/reverse_kl_k1": "Reverse KL of rollouts, nats/token",
}
"""What is worth a chart, with its caption."""
MOST_POINTS = 240


def read_curves(path: Path, names: Collection[str] = TRAINING) -> dict[str, dict[str, list[Any]]]:
    """``{name: {"steps": […], "values": […]}}`` of what is worth a chart; nothing where there is no file.

    A curve of more than 240 points is thinned to the means of as many equal stretches, each at its mean step.

    Args:
        path: a ``metrics.csv``.
        names: the metrics to read.
    """
    found: dict[str, dict[float, float]] = {}  # a step that a resumed run has logged again counts once
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                step = _number(row.get("step"))
                for name in names:
                    value = _number(row.get(name))
                    if step is not None and value is not None:
                        found.setdefault(name, {})[step] = value
    thinned = {name: _thinned(sorted(found[name].items())) for name in names if name in found}
    return {
        name: {"steps": [s for s, _ in points], "values": [v for _, v in points]} for name, points in thinned.items()
    }


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= MOST_POINTS:
        return points
    edges = [index * len(points) // MOST_POINTS for index in range(MOST_POINTS + 1)]
    chunks = [points[start:end] for start, end in pairwise(edges)]
    return [(fmean(step for step, _ in chunk), fmean(value for _, value in chunk)) for chunk in chunks]


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:  # a line that was cut when the run was killed
        return None
    return value if math.isfinite(value) else None


def mean_curve(label: str, style: int, courses: Sequence[Sequence[tuple[float, float]]]) -> Curve:
    """The mean of several courses where all of them have a point, with the band from the lowest to the highest."""
    if len(courses) == 1:
        return Curve(label, style, sorted(courses[0]))
    tables = [dict(course) for course in courses]
    shared = {x: [table[x] for table in tables] for x in sorted(set.intersection(*map(set, tables)))}
    points = [(x, fmean(values)) for x, values in shared.items()]
    return Curve(label, style, points, [(x, min(values), max(values)) for x, values in shared.items()])
