"""The sections of the page as plain data: what the template shows, and nothing about how."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_distill.report.columns import Column
from lit_distill.report.curves import TRAINING, mean_curve
from lit_distill.report.figures import Bar, Curve, Reliability, draw_bars, draw_curves, draw_reliability
from lit_distill.report.metrics import KNOWN, NOTHING, Metric, metric_of, number
from lit_distill.report.settings import Settings, differing, method_settings, test_settings
from lit_distill.report.table import Row, notes_on, rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IN_SECTIONS = ("calibration", "exposure_bias", "generation", "judge")
BY_LENGTH = ("rouge_l", "exact_match", "answer_accuracy", "response_length", "unfinished")
LONGEST = 4000
"""Characters of a text on the page; the whole text is in the record."""
MOST_SETTINGS = 40
MOST_SAMPLES = 12


class Drawing(NamedTuple):
    """A figure with what it shows."""

    caption: str
    note: str
    alt: str
    """What is to be seen, for those who cannot see it."""
    draw: Callable[[Figure], None]
    width: float = 360
    height: float = 232


@dataclass(frozen=True)
class Block:
    """A part of a section; what is empty is not shown."""

    head: str = ""
    legend: Sequence[Column] = ()
    drawings: Sequence[Drawing] = ()
    heads: Sequence[tuple[str, str]] = ()
    """Of a table: label and note of each column."""
    rows: Sequence[Row] = ()
    words: bool = False
    """Whether the table holds words rather than numbers."""
    answers: Sequence[tuple[str, str]] = ()
    """Who has said what; the first is the prompt."""
    code: str = ""
    """Folded under its head, if it has one."""


class Section(NamedTuple):
    """A section of the page; without blocks there is none."""

    anchor: str
    title: str
    blocks: Sequence[Block] = ()
    note: str = ""


def metrics(columns: Sequence[Column]) -> Section:
    """The table of all metrics."""
    rows = rows_of(columns)
    block = Block(heads=[(column.label, column.note) for column in columns], rows=rows)
    return Section("metrics", "Metrics on the test data", [block] if rows else [], " ".join(notes_on(columns)))


def settings(columns: Sequence[Column]) -> Section:
    """In which settings the students' trainings and tests differ."""
    students = [column for column in columns if column.model == "student"]
    trained = [column for column in students if column.reports[0]["checkpoint"]]
    blocks = []
    kinds: tuple[tuple[str, list[Column], Callable[[Mapping[str, Any]], Settings]], ...] = (
        ("Trainings", trained, method_settings),
        ("Tests: metrics of columns that were not tested alike are not comparable", students, test_settings),
    )
    for head, shown, read in kinds:
        found = differing([read(column.reports[0]) for column in shown])
        rows = [_plain_row(key, values) for key, values in list(found.items())[:MOST_SETTINGS]]
        if len(found) > MOST_SETTINGS:
            rows.append(_plain_row(f"and {len(found) - MOST_SETTINGS} more", ["…"] * len(shown)))
        if rows:
            blocks.append(Block(head, heads=[(column.label, "") for column in shown], rows=rows, words=True))
    return Section("settings", "Where the runs' settings differ", blocks)


def _plain_row(name: str, cells: Iterable[str]) -> Row:
    texts = list(cells)
    return Row(name, Metric(name, ""), texts, [False] * len(texts))


def calibration(columns: Sequence[Column]) -> Section:
    """A reliability diagram of each model, for next tokens and for every task."""
    blocks = []
    for name in dict.fromkeys(entry["name"] for column in columns for entry in column.entries("calibration")):
        drawings = []
        for column in columns:
            entries = [entry for entry in column.entries("calibration") if entry["name"] == name]
            if column.model == "teacher":
                entries = entries[:1]  # its tests are of the same texts
            if bins := pooled(entries):
                drawings.append(_reliability(column, entries, bins))
        if drawings:
            head = "Next tokens of held-out responses" if name == "next token" else f"Task: {name}"
            blocks.append(Block(head, drawings=drawings))
    note = (
        "Bars: how often the prediction was right, by how sure the model was. On the dashed line a model is as often right as it "
        "is sure; the thin line from a bin's mean is its gap. Below: each bin's share of the predictions."
    )
    return Section("calibration", "Calibration", blocks, note)


def _reliability(column: Column, entries: Sequence[Mapping[str, Any]], bins: Sequence[Mapping[str, Any]]) -> Drawing:
    def mean(key: str, decimals: int, scale: float = 1.0) -> str:
        values = [entry[key] for entry in entries if entry.get(key) is not None]
        return number(fmean(values) * scale, decimals) if values else NOTHING

    told = "; ".join(
        f"confidence {b['confidence']:.2f}: {b['accuracy']:.0%} right, {b['count']} predictions" for b in bins
    )
    note = f"ECE {mean('ece', 3)}, {mean('accuracy', 1, 100)} % right, {sum(b['count'] for b in bins):,} predictions"
    model = Reliability("", column.style, bins)
    alt = f"Reliability of {column.label}. {told}."
    return Drawing(column.label, note, alt, lambda figure: draw_reliability(figure, [model]), 340, 340)


def pooled(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The bins of several seeds as one: bins of the same edges add their predictions."""
    parts: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for one in (one for entry in entries for one in entry["bins"] if one["count"]):
        parts.setdefault((round(one["low"], 6), round(one["high"], 6)), []).append(one)
    bins = []
    for (low, high), found in sorted(parts.items()):
        count = sum(one["count"] for one in found)
        means = {key: sum(one[key] * one["count"] for one in found) / count for key in ("confidence", "accuracy")}
        bins.append({"low": low, "high": high, "count": count, **means})
    return bins


def exposure_bias(columns: Sequence[Column]) -> Section:
    """The curves of excess accumulated error, and of what it is made of."""
    students = [column for column in columns if column.entries("exposure_bias")]
    if not students:
        return Section("exposure-bias", "Exposure bias")
    excess = [_over_lengths(column, column.style, "ex_acc_err") for column in students]
    pairs = [
        [
            _over_lengths(c, c.style, "regret_student"),
            _over_lengths(c, 0, "regret_teacher", ", along the teacher's texts"),
        ]
        for c in students
    ]
    ends = [most for pair in pairs for curve in pair for _, *_, most in (curve.band or curve.points)]
    highest = max(ends, default=0.0)  # on all axes, so that the eye can compare
    drawings = [_lines("ExAccErr, % (lower is better)", excess, "response tokens", [0.0])]
    for column, pair in zip(students, pairs, strict=True):
        caption = f"Accumulated KL(teacher ‖ student), nats: {column.label}"
        told = "dashed with squares: along the teacher's texts"
        drawings.append(_lines(caption, pair, "response tokens", [0.0, highest], told))
    first = students[0].entries("exposure_bias")[0]
    note = (
        "How much more error the student gathers along texts that it writes itself than along its teacher's, up to each length. "
        f"{first['num_prompts']} prompts, {first['num_samples']} texts of each model for each."
    )
    return Section("exposure-bias", "Exposure bias", [Block(legend=students, drawings=drawings)], note)


def _over_lengths(column: Column, style: int, key: str, whose: str = "") -> Curve:
    pairs = [zip(entry["lengths"], entry[key], strict=True) for entry in column.entries("exposure_bias")]
    courses = [[(float(at), value) for at, value in course if value is not None] for course in pairs]
    return mean_curve(column.label + whose, style, courses)


def _lines(caption: str, curves: Sequence[Curve], x: str, include: Sequence[float] = (), note: str = "") -> Drawing:
    drawn = [curve for curve in curves if curve.points]
    ends = [(curve.label, *curve.points[0], *curve.points[-1]) for curve in drawn]
    told = "; ".join(f"{label}: {a:.4g} at {start:g} to {b:.4g} at {end:g}" for label, start, a, end, b in ends)
    alt = f"{caption}, over {x}. {told}."
    return Drawing(caption, note, alt, lambda figure: draw_curves(figure.subplots(), drawn, x, include=include))


def by_length(columns: Sequence[Column]) -> Section:
    """Scores of generated responses by the length of the reference."""
    buckets: dict[str, list[tuple[Column, dict[str, Any]]]] = {}
    for column in columns:
        for bucket in (b for entry in column.entries("generation") for b in entry.get("buckets") or []):
            buckets.setdefault(bucket["label"], []).append((column, bucket))
    drawings = [drawing for score in BY_LENGTH if (drawing := _bars(score, buckets, columns))]
    shown = [column for column in columns if any(column is owner for found in buckets.values() for owner, _ in found)]
    block = Block(legend=shown, drawings=drawings)
    note = "Responses by the number of words in their reference; n of them."
    return Section("lengths", "By length of the reference", [block] if drawings else [], note)


def _bars(score: str, buckets: Mapping[str, Any], columns: Sequence[Column]) -> Drawing | None:
    metric, groups, told = metric_of(score), [], []
    for name, found in buckets.items():
        bars, counts = [], set()
        for column in columns:
            parts = [part for owner, part in found if owner is column and part["scores"].get(score) is not None]
            if parts:
                mean = fmean(part["scores"][score] for part in parts) * metric.scale
                bars.append(Bar(column.style, mean, number(mean, metric.decimals)))
                told.append(f"{name}, {column.label}: {bars[-1].text}")
                counts |= {part["count"] for part in parts}
        if any(bar.value for bar in bars):
            size = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
            groups.append((f"{name}\nn = {size}", bars))
    if not groups:
        return None
    full = 100.0 if metric.unit.startswith("%") else 0.0
    height = sum(max(40, 18 * len(bars) + 14) for _, bars in groups)
    alt = f"{metric.head} by reference length. {'; '.join(told)}."
    return Drawing(metric.head, "", alt, lambda figure: draw_bars(figure.subplots(), groups, full), height=height)


def judge(columns: Sequence[Column]) -> Section:
    """How a judge was asked, and what it cost; its scores are among the metrics."""
    asked = [(column.label, entry) for column in columns for entry in column.entries("judge")]
    found = dict.fromkeys(
        key for _, entry in asked for key, value in entry.items() if not isinstance(value, (list, dict))
    )
    keys = [key for key in found if f"judge_{key}" not in KNOWN]
    rows = [_plain_row(key.replace("_", " "), [_value(entry.get(key)) for _, entry in asked]) for key in keys]
    labels = [label for label, _ in asked]
    notes = [f"{labels[: i + 1].count(label)} of {labels.count(label)}" for i, label in enumerate(labels)]
    heads = [(label, "" if note == "1 of 1" else note) for label, note in zip(labels, notes, strict=True)]
    return Section("judge", "Judge", [Block(heads=heads, rows=rows, words=True)] if rows else [])


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: NOTHING}[value]
    return str(value) if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def training(columns: Sequence[Column]) -> Section:
    """The course of the trainings whose checkpoints were tested."""
    students = [c for c in columns if c.model == "student" and any(report["curves"] for report in c.reports)]
    drawings = []
    for name, caption in TRAINING.items():
        curves = []
        for column in students:
            found = [report["curves"][name] for report in column.reports if name in report["curves"]]
            courses = [list(zip(curve["steps"], curve["values"], strict=True)) for curve in found]
            curves += [mean_curve(column.label, column.style, courses)] if courses else []
        if any(curve.points for curve in curves):
            drawings.append(_lines(caption, curves, "optimiser step"))
    several = any(len(column.reports) > 1 for column in students)
    note = "Lines are means over seeds, bands, if there are few, from the lowest to the highest." if several else ""
    return Section("training", "Training", [Block(legend=students, drawings=drawings)] if drawings else [], note)


def samples(columns: Sequence[Column]) -> Section:
    """Answers of every model to the same prompts, beside the reference; those that most have answered first."""
    found: dict[tuple[str, str], tuple[str, dict[str, str]]] = {}
    for column in columns:
        for sample in (s for entry in column.entries("generation")[:1] for s in entry.get("samples") or []):
            identity = str(sample["id"]), sample["prompt"]
            _, answers = found.setdefault(identity, (sample.get("reference") or "", {}))
            answers[column.label] = sample["response"]
    blocks = []
    for (name, prompt), (reference, answers) in sorted(found.items(), key=lambda pair: -len(pair[1][1]))[:MOST_SAMPLES]:
        said = {"prompt": prompt, "reference": reference} | answers
        blocks.append(Block(name, answers=[(who, _cut(text)) for who, text in said.items()]))
    several = any(len(column.reports) > 1 for column in columns if column.model == "student")
    note = "Of a column with several seeds, the answer of the first." if several else ""
    return Section("samples", "Responses side by side", blocks, note)


def _cut(text: str) -> str:
    return (
        f"{text[:LONGEST]}\n… {len(text) - LONGEST:,} more characters in report.json" if len(text) > LONGEST else text
    )


def others(columns: Sequence[Column]) -> Section:
    """Sections of callbacks that this page has no chart for, as they are."""
    blocks = [
        Block(f"{name}: {c.label}, {r['run'].get('folder')}", code=json.dumps(entries, indent=1, ensure_ascii=False))
        for c in columns
        if c.model == "student"
        for r in c.reports
        for name, entries in r["sections"].items()
        if name not in IN_SECTIONS
    ]
    return Section("more", "Other reports", blocks)
