"""The sections on what a model is sure of, and what becomes of it along its own texts."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from lit_distill.report.charts import Curve, line_chart, mean_curve, reliability_diagram
from lit_distill.report.columns import Column
from lit_distill.report.metrics import NOTHING, number
from lit_distill.report.parts import Section, esc, figure, legend


def calibration(columns: Sequence[Column]) -> Section | None:
    """A reliability diagram for each model, next tokens and every task."""
    told_of = {
        name: [(c, [e for e in c.entries("calibration") if e["name"] == name]) for c in columns]
        for name in _tasks(columns)
    }
    blocks = []
    for name, models in told_of.items():
        panels = []
        for column, found in models:
            entries = found[:1] if column.model == "teacher" else found  # a teacher's tests are of the same texts
            if bins := _pooled(entries):
                ece, accuracy = (_mean(entries, key) for key in ("ece", "accuracy"))
                told = f"ECE {_shown(ece, 3)}, {_shown(accuracy, 1, 100)} % right, {sum(b['count'] for b in bins):,} predictions"
                drawing = reliability_diagram(f"Reliability of {column.label}: {name}", bins, column.style)
                panels.append(figure(drawing, column.label, told))
        if panels:
            head = "Next tokens of held-out responses" if name == "next token" else f"Task: {name}"
            blocks.append(f'<h3>{esc(head)}</h3><div class="charts small">{"".join(panels)}</div>')
    if not blocks:
        return None
    note = (
        '<p class="note">Bars: how often the prediction was right, by how sure the model was. On the dashed line a model is as '
        "often right as it is sure; the thin line from a bin's mean is its gap. Below: each bin's share of the predictions.</p>"
    )
    return Section("calibration", "Calibration", note + "".join(blocks))


def _tasks(columns: Sequence[Column]) -> list[str]:
    return list(dict.fromkeys(entry["name"] for column in columns for entry in column.entries("calibration")))


def _pooled(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bins of several seeds as one: bins of the same edges add their predictions."""
    pooled: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for one in (one for entry in entries for one in entry["bins"] if one["count"]):
        pooled.setdefault((round(one["low"], 6), round(one["high"], 6)), []).append(one)
    bins = []
    for (low, high), parts in sorted(pooled.items()):
        count = sum(part["count"] for part in parts)
        means = {key: sum(part[key] * part["count"] for part in parts) / count for key in ("confidence", "accuracy")}
        bins.append({"low": low, "high": high, "count": count, **means})
    return bins


def exposure_bias(columns: Sequence[Column]) -> Section | None:
    """The curves of excess accumulated error, and of what it is made of."""
    students = [column for column in columns if column.entries("exposure_bias")]
    if not students:
        return None
    excess, regret = [], []
    for column in students:
        entries = column.entries("exposure_bias")
        excess.append(_over_lengths(column.label, column.style, entries, "ex_acc_err"))
        regret.append(_over_lengths(f"{column.label}, along its own texts", column.style, entries, "regret_student"))
        regret.append(_over_lengths(f"{column.label}, along the teacher's texts", 0, entries, "regret_teacher"))
    first = students[0].entries("exposure_bias")[0]
    highest = max(most for curve in regret for *_, most in (curve.band or curve.points))
    charts = [
        figure(
            line_chart("Excess accumulated error", excess, "response tokens", include=[0.0]),
            "ExAccErr, % (lower is better)",
        ),
        *(
            figure(
                line_chart(
                    f"Accumulated error of {column.label}",
                    regret[2 * i : 2 * i + 2],
                    "response tokens",
                    include=[0.0, highest],
                ),
                f"Accumulated KL(teacher ‖ student), nats: {column.label}",
                "dashed with squares: along the teacher's texts",
            )
            for i, column in enumerate(students)
        ),
    ]
    note = (
        '<p class="note">How much more error the student gathers along texts that it writes itself than along its teacher\'s, up '
        f"to each length. {first['num_prompts']} prompts, {first['num_samples']} texts of each model for each.</p>"
    )
    return Section(
        "exposure-bias", "Exposure bias", f'{note}{legend(students)}<div class="charts">{"".join(charts)}</div>'
    )


def _over_lengths(label: str, style: int, entries: Sequence[dict[str, Any]], key: str) -> Curve:
    curves = [
        [(float(at), value) for at, value in zip(e["lengths"], e[key], strict=True) if value is not None]
        for e in entries
    ]
    return mean_curve(label, style, curves)


def _mean(entries: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [entry[key] for entry in entries if entry.get(key) is not None]
    return fmean(values) if values else None


def _shown(value: float | None, decimals: int, scale: float = 1.0) -> str:
    return NOTHING if value is None else number(value * scale, decimals)
