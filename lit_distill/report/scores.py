"""The sections on responses by length, and on how training went."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from lit_distill.report.charts import Bar, bar_chart, line_chart, mean_curve
from lit_distill.report.columns import Column
from lit_distill.report.metrics import metric_of, number
from lit_distill.report.parts import Section, figure, legend

TRAINING = {
    "train/loss": "Training loss",
    "val/loss": "Validation loss",
    "val/perplexity": "Validation perplexity",
    "val/forward_kl": "Validation KL(teacher ‖ student), nats/token",
    "val/reverse_kl": "Validation KL(student ‖ teacher), nats/token",
    "val/rouge_l": "Validation ROUGE-L, %",
    "val/exact_match": "Validation exact match, %",
    "val/ece": "Validation ECE of next tokens",
    "rollout/reward": "Reward of rollouts, nats/token",
    "rollout/reverse_kl_k1": "Reverse KL of rollouts, nats/token",
}
BY_LENGTH = ("rouge_l", "exact_match", "response_length", "unfinished")


def by_length(columns: Sequence[Column]) -> Section | None:
    """Scores of generated responses by the length of the reference."""
    found = {column.label: _buckets(column) for column in columns}
    names = list(dict.fromkeys(name for buckets in found.values() for name in buckets))
    charts = []
    for score in BY_LENGTH:
        metric, groups = metric_of(score), []
        for name in names:
            bars, counts = [], []
            for column in columns:
                parts = found[column.label].get(name, [])
                values = [
                    part["scores"][score] * metric.scale for part in parts if part["scores"].get(score) is not None
                ]
                if values:
                    text = number(fmean(values), metric.decimals)
                    bars.append(Bar(column.label, column.style, fmean(values), text))
                    counts += [part["count"] for part in parts]
            if any(bar.value for bar in bars):
                size = f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
                groups.append((f"{name} (n = {size})", bars))
        if groups:
            caption = f"{metric.head} {metric.arrow}".strip()
            full = 100.0 if metric.unit.startswith("%") else 0.0
            charts.append(figure(bar_chart(f"{metric.head} by reference length", groups, full), caption))
    if not charts:
        return None
    note = '<p class="note">Responses by the number of words in their reference; n of them.</p>'
    return Section("lengths", "By length of the reference", f'{note}<div class="charts">{"".join(charts)}</div>')


def _buckets(column: Column) -> dict[str, list[dict[str, Any]]]:
    buckets: dict[str, list[dict[str, Any]]] = {}
    for entry in column.entries("generation"):
        for bucket in entry.get("buckets") or []:
            buckets.setdefault(bucket["label"], []).append(bucket)
    return buckets


def training(columns: Sequence[Column]) -> Section | None:
    """The course of the trainings whose checkpoints were tested."""
    students = [c for c in columns if c.model == "student" and any(report["curves"] for report in c.reports)]
    charts = []
    for name, caption in TRAINING.items():
        curves = [
            mean_curve(column.label, column.style, runs)
            for column in students
            if (runs := [_points(report["curves"][name]) for report in column.reports if name in report["curves"]])
        ]
        if any(curve.points for curve in curves):
            charts.append(figure(line_chart(caption, curves, "optimiser step"), caption))
    if not charts:
        return None
    several = any(len(column.reports) > 1 for column in students)
    note = (
        '<p class="note">Lines are means over seeds, bands, if there are few, from the lowest to the highest.</p>'
        if several
        else ""
    )
    return Section("training", "Training", f'{note}{legend(students)}<div class="charts">{"".join(charts)}</div>')


def _points(curve: dict[str, list[float]]) -> list[tuple[float, float]]:
    return list(zip(curve["steps"], curve["values"], strict=True))
