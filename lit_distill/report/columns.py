"""The columns of a comparison: one for each student, whatever its number of seeds, and one for each teacher."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from lit_distill.report.record import Report
from lit_distill.report.settings import distinctions, method_settings, teacher_settings, test_settings


class Summary(NamedTuple):
    """A metric over the seeds that there are."""

    mean: float
    std: float | None
    """Of a sample; None for one seed."""
    n: int


@dataclass(frozen=True)
class Column:
    """A student, trained with one seed or several in the same way, or a teacher."""

    model: str
    """``student`` or ``teacher``."""
    reports: tuple[Report, ...]
    label: str = ""
    note: str = ""
    """What the label leaves out: seeds, place."""
    metrics: dict[str, Summary] = field(default_factory=dict)
    style: int = 0
    """Number of its colour, marker and dash; 0 is the teacher's."""

    def entries(self, section: str) -> list[Any]:
        """What callbacks have reported of this model, over all reports; sections that name none are the student's."""
        found = [entry for report in self.reports for entry in report["sections"].get(section) or []]
        return [e for e in found if isinstance(e, dict) and e.get("role", e.get("speaker", "student")) == self.model]


def columns_of(reports: Sequence[Report]) -> tuple[list[Column], list[str]]:
    """Teachers before students, the untrained before the trained, and notes on what was left out.

    Reports of the same name, settings and test that differ in their seed are one column.
    """
    groups, notes = _groups(reports)
    students = [Column("student", tuple(group), metrics=_metrics(group, "student")) for group in groups]
    students.sort(key=lambda column: column.reports[0]["checkpoint"] is not None)
    students = [replace(column, style=index + 1) for index, column in enumerate(_labelled(students))]
    return _teachers(reports) + students, notes


def _groups(reports: Sequence[Report]) -> tuple[list[list[Report]], list[str]]:
    alike: dict[str, list[Report]] = {}
    for report in reports:
        alike.setdefault(_key(report), []).append(report)
    groups, notes = [], []
    for group in alike.values():
        newest: dict[Any, Report] = {}
        for report in sorted(group, key=lambda report: str(report["run"].get("date"))):
            again = (report["run"].get("seed"), _step(report))
            if again in newest and newest[again] != report:
                folders = newest[again]["run"].get("folder"), report["run"].get("folder")
                notes.append(f"{folders[0]} is an older test of what {folders[1]} tests, and is left out.")
            newest[again] = report
        chosen = list(newest.values())
        seeds = [report["run"].get("seed") for report in chosen]
        if len(set(seeds)) < len(seeds):  # one training at several steps: each step is a student of its own
            steps = sorted({_step(report) for report in chosen})
            groups += [[report for report in chosen if _step(report) == step] for step in steps]
        else:
            groups.append(chosen)
    return [sorted(group, key=lambda report: report["run"].get("seed") or 0) for group in groups], notes


def _key(report: Report) -> str:
    trained = report["checkpoint"] is not None
    who = (report["run"].get("name"), trained, report["student"], report["teacher"])
    return json.dumps([*who, method_settings(report), test_settings(report)], sort_keys=True)


def _step(report: Report) -> int:
    return int((report["checkpoint"] or {}).get("step") or 0)


def _labelled(students: list[Column]) -> list[Column]:
    several = len({column.reports[0]["run"].get("name") for column in students}) > 1
    trained_from = {column.reports[0]["student"].get("path") for column in students if column.reports[0]["checkpoint"]}
    labelled = []
    for column in students:
        first = column.reports[0]
        steps = sorted({_step(report) for report in column.reports})
        if first["checkpoint"]:
            stage = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
        else:
            stage = "before training" if first["student"].get("path") in trained_from else "as given"
        name = str(first["run"].get("name")) if several else "student"
        seeds = [str(report["run"].get("seed")) for report in column.reports if report["run"].get("seed") is not None]
        word = "seeds" if len(seeds) > 1 else "seed"
        place = str(first["student"].get("path")) if stage == "as given" else ""
        note = f"{word} {', '.join(seeds)}" if seeds and first["checkpoint"] else place
        labelled.append(replace(column, label=f"{name}, {stage}", note=note))
    return _told_apart(labelled, [[test_settings(r) | method_settings(r) for r in c.reports] for c in labelled])


def _told_apart(columns: Sequence[Column], settings: Sequence[Sequence[dict[str, str]]]) -> list[Column]:
    """Columns with the settings that differ in the labels that were the same; or the folder, where that is too much to say."""
    told = list(columns)
    for label in {column.label for column in columns}:
        same = [index for index, column in enumerate(columns) if column.label == label]
        if len(same) > 1:
            names = distinctions([settings[index] for index in same])
            if len(set(names)) < len(names):
                names = [Path(columns[index].reports[0]["run"]["folder"]).name for index in same]
            for index, name in zip(same, names, strict=True):
                told[index] = replace(columns[index], label=f"{label} ({name})")
    return told


def _teachers(reports: Sequence[Report]) -> list[Column]:
    """One for each teacher, and more only where tests have found other metrics of it."""
    alike: dict[str, list[Report]] = {}
    for report in reports:
        if report["teacher"]:
            same = json.dumps([report["teacher"], teacher_settings(report)], sort_keys=True)
            alike.setdefault(same, []).append(report)
    columns: list[Column] = []
    stands_for: list[list[Report]] = []
    for group in alike.values():
        # The tests of several students say the same of the same teacher: that counts once.
        told = {json.dumps({n: v for n, v in r["metrics"].items() if split_model(n)[0] == "teacher"}): r for r in group}
        if not (metrics := _metrics(list(told.values()), "teacher")):
            continue
        path = group[0]["teacher"]["path"]
        column = Column("teacher", tuple(told.values()), f"teacher {Path(path).name}", metrics=metrics)
        for index, other in enumerate(columns):
            if other.reports[0]["teacher"]["path"] == path and (_says(other, column) or _says(column, other)):
                stands_for[index] += group
                columns[index] = other if _says(other, column) else column
                break
        else:
            columns.append(column)
            stands_for.append(list(group))
    if len({column.label for column in columns}) == 1:
        columns = [replace(column, label="teacher") for column in columns]
    return _told_apart(columns, [[teacher_settings(report) for report in group] for group in stands_for])


def _says(column: Column, other: Column) -> bool:
    """Whether a column has every metric of another one, but for the last bits, which depend on how texts share a batch."""
    return all(
        name in column.metrics and math.isclose(column.metrics[name].mean, metric.mean, rel_tol=1e-4, abs_tol=1e-6)
        for name, metric in other.metrics.items()
    )


def _metrics(group: Sequence[Report], model: str) -> dict[str, Summary]:
    """Over training seeds where there are several, else over the seeds of the draws, where the test had several."""
    values: dict[str, list[float]] = {}
    for report in group:
        for name, value in report["metrics"].items():
            who, plain = split_model(name)
            if who == model and value is not None:
                values.setdefault(plain, []).append(float(value))
    draws = {name for name in values if name.endswith("_std") and name.removesuffix("_std") in values}
    metrics = {}
    for name, found in values.items():
        if name in draws:
            continue
        spread = stdev(found) if len(found) > 1 else None
        if spread is None and f"{name}_std" in draws and len(group) == 1:
            spread = values[f"{name}_std"][0]
        metrics[name] = Summary(fmean(found), spread, len(found))
    return metrics


def split_model(name: str) -> tuple[str, str]:
    """``task/teacher_ece`` is the teacher's ``task/ece``."""
    head, slash, last = name.rpartition("/")
    for part, rest in ((last, lambda text: f"{head}{slash}{text}"), (name, str)):
        if part.startswith("teacher_"):
            return "teacher", rest(part.removeprefix("teacher_"))
    return "student", name
