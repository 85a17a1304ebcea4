"""The columns of a comparison: one for each student, whatever its number of seeds, and one for each teacher."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from lit_distill.report.record import Report
from lit_distill.report.settings import Settings, distinctions, method_settings, teacher_settings, test_settings


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
    """Number of its colour, marker and dashes; 0 is the teacher's."""

    def entries(self, section: str) -> list[Any]:
        """What callbacks have reported of this model, over all reports; sections that name none are the student's."""
        found = [entry for report in self.reports for entry in report["sections"].get(section) or []]
        return [e for e in found if isinstance(e, dict) and e.get("role", e.get("speaker", "student")) == self.model]


def columns_of(reports: Sequence[Report]) -> tuple[list[Column], list[str]]:
    """Teachers before students, the untrained before the trained, else names in the order given; and notes on what was left out.

    Reports of the same name, settings and test that differ in their seed are one column.
    """
    groups, notes = _groups(reports)
    names = [report["run"].get("name") for report in reports]
    groups.sort(key=lambda group: (group[0]["checkpoint"] is not None, names.index(group[0]["run"].get("name"))))
    students = [Column("student", tuple(group), metrics=_metrics(group, "student")) for group in groups]
    labelled = _told_apart(_labelled(students), groups, lambda report: test_settings(report) | method_settings(report))
    return _teachers(reports) + [replace(column, style=index) for index, column in enumerate(labelled, start=1)], notes


def _groups(reports: Sequence[Report]) -> tuple[list[list[Report]], list[str]]:
    alike: dict[str, dict[Any, Report]] = {}
    notes = []
    for report in sorted(reports, key=lambda report: str(report["run"].get("date"))):
        who = (report["run"].get("name"), report["checkpoint"] is not None, report["student"], report["teacher"])
        same = json.dumps([*who, method_settings(report), test_settings(report)], sort_keys=True)
        newest, again = alike.setdefault(same, {}), (report["run"].get("seed"), _step(report))
        if again in newest and newest[again] != report:
            folders = newest[again]["run"].get("folder"), report["run"].get("folder")
            notes.append(f"{folders[0]} is an older test of what {folders[1]} tests, and is left out.")
        newest[again] = report
    groups: list[list[Report]] = []
    for newest in alike.values():
        chosen = [newest[key] for key in sorted(newest, key=lambda key: key[0] or 0)]
        steps = sorted({step for _, step in newest})
        if len({seed for seed, _ in newest}) < len(
            newest
        ):  # one training at several steps: each is a student of its own
            groups += [[report for report in chosen if _step(report) == step] for step in steps]
        else:
            groups.append(chosen)
    return groups, notes


def _step(report: Report) -> int:
    return int((report["checkpoint"] or {}).get("step") or 0)


def _labelled(students: Sequence[Column]) -> list[Column]:
    several = len({column.reports[0]["run"].get("name") for column in students}) > 1
    trained_from = {column.reports[0]["student"].get("path") for column in students if column.reports[0]["checkpoint"]}
    labelled = []
    for column in students:
        first, path = column.reports[0], column.reports[0]["student"].get("path")
        steps = sorted({_step(report) for report in column.reports})
        seeds = [str(report["run"]["seed"]) for report in column.reports if report["run"].get("seed") is not None]
        note = ""
        if first["checkpoint"]:
            stage = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
            note = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}" if seeds else ""
        elif path in trained_from:
            stage = "before training"
        else:
            stage, note = "as given", str(path)
        labelled.append(
            replace(column, label=f"{first['run'].get('name') if several else 'student'}, {stage}", note=note)
        )
    return labelled


def _told_apart(
    columns: Sequence[Column], groups: Sequence[Sequence[Report]], read: Callable[[Report], Settings]
) -> list[Column]:
    """Columns with the settings that differ in labels that were the same; or the folder, where that is too much to say.

    Args:
        columns: with labels.
        groups: the reports that each column stands for.
        read: the settings of a report that count.
    """
    told = list(columns)
    for label in {column.label for column in columns}:
        same = [index for index, column in enumerate(columns) if column.label == label]
        if len(same) > 1:
            names = distinctions([[read(report) for report in groups[index]] for index in same])
            if len(set(names)) < len(names):
                names = [Path(columns[index].reports[0]["run"]["folder"]).name for index in same]
            for index, name in zip(same, names, strict=True):
                told[index] = replace(columns[index], label=f"{label} ({name})")
    return told


def _teachers(reports: Sequence[Report]) -> list[Column]:
    """One for each teacher, and more only where tests in other settings have found other metrics of it."""
    groups: list[list[Report]] = []
    for report in reports:
        if report["teacher"] and _metrics([report], "teacher"):
            for group in groups:
                if report["teacher"] == group[0]["teacher"] and any(_alike(report, other) for other in group):
                    group.append(report)
                    break
            else:
                groups.append([report])
    columns = []
    for group in groups:
        told: list[Report] = []  # the tests of several students say the same of the same teacher: that counts once
        for report in sorted(group, key=lambda report: -len(_metrics([report], "teacher"))):
            if not any(_says(other, report) for other in told):
                told.append(report)
        columns.append(Column("teacher", tuple(told), metrics=_metrics(told, "teacher")))
    names = [f"teacher {Path(column.reports[0]['teacher']['path']).name}" for column in columns]
    labels = names if len(set(names)) > 1 else ["teacher"] * len(names)
    columns = [replace(column, label=label) for column, label in zip(columns, labels, strict=True)]
    return _told_apart(columns, groups, teacher_settings)


def _alike(one: Report, other: Report) -> bool:
    return teacher_settings(one) == teacher_settings(other) or _says(one, other) or _says(other, one)


def _says(report: Report, other: Report) -> bool:
    """Whether a report has every metric of the other's teacher, but for the last bits, which depend on how texts share a batch."""
    has = _metrics([report], "teacher")
    return all(
        name in has and math.isclose(has[name].mean, metric.mean, rel_tol=1e-4, abs_tol=1e-6)
        for name, metric in _metrics([other], "teacher").items()
    )


def _metrics(group: Sequence[Report], model: str) -> dict[str, Summary]:
    """Over training seeds where there are several, else over the seeds of the draws, where the test had several."""
    values: dict[str, list[float]] = {}
    for report in group:
        for name, value in report["metrics"].items():
            who, plain = split_model(name)
            if who == model and value is not None:
                values.setdefault(plain, []).append(float(value))
    metrics = {}
    for name, found in values.items():
        if name.endswith("_std") and name.removesuffix("_std") in values:
            continue
        draws = values.get(f"{name}_std") if len(group) == 1 else None
        spread = stdev(found) if len(found) > 1 else draws[0] if draws else None
        metrics[name] = Summary(fmean(found), spread, len(found))
    return metrics


def split_model(name: str) -> tuple[str, str]:
    """``task/teacher_ece`` is the teacher's ``task/ece``."""
    head, slash, last = name.rpartition("/")
    if last.startswith("teacher_"):
        return "teacher", f"{head}{slash}{last.removeprefix('teacher_')}"
    return ("teacher", name.removeprefix("teacher_")) if name.startswith("teacher_") else ("student", name)
