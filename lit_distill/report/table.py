"""The table of all metrics: rows for the page and lines for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from lit_distill.report.columns import Column, Summary
from lit_distill.report.metrics import OTHER, Metric, decimals_for, metric_of, number, sort_key

BEST = "★"


class Row(NamedTuple):
    """A metric of every column, ready to be read."""

    name: str
    metric: Metric
    cells: list[str]
    """One a column, empty where it has no such metric."""
    best: list[bool]
    """Of the compared columns."""


def rows_of(columns: Sequence[Column]) -> list[Row]:
    """All metrics, in reading order; those by length of the reference have a chart of their own."""
    names = {name for column in columns for name in column.metrics if not ("/" in name and name.endswith("_words"))}
    return [_row(name, columns) for name in sorted(names, key=sort_key)]


def _row(name: str, columns: Sequence[Column]) -> Row:
    metric = metric_of(name)
    found = [column.metrics.get(name) for column in columns]
    decimals = decimals_for(metric, [one.mean * metric.scale for one in found if one])
    cells = [_cell(one, metric, decimals, len(c.reports)) for one, c in zip(found, columns, strict=True)]
    compared = {index: one.mean for index, one in enumerate(found) if one and index in _competitors(columns)}
    shown = {index: number(mean * metric.scale, decimals) for index, mean in compared.items()}
    winner = None
    if metric.better and len(set(shown.values())) > 1:  # what looks the same is the same
        winner = shown[(min if metric.better == "lower" else max)(compared, key=lambda index: compared[index])]
    return Row(name, metric, cells, [winner is not None and shown.get(i) == winner for i in range(len(columns))])


def _competitors(columns: Sequence[Column]) -> list[int]:
    """Who can be best: the students among themselves; a lone student and its teacher."""
    students = [index for index, column in enumerate(columns) if column.model == "student"]
    return students if len(students) > 1 else list(range(len(columns)))


def _cell(summary: Summary | None, metric: Metric, decimals: int, num_reports: int) -> str:
    if summary is None:
        return ""
    spread = "" if summary.std is None else f" ± {number(summary.std * metric.scale, decimals)}"
    some_lack_it = f" ({summary.n} of {num_reports})" if summary.n < num_reports else ""
    return number(summary.mean * metric.scale, decimals) + spread + some_lack_it


def notes_on(columns: Sequence[Column]) -> list[str]:
    """What the signs in this table mean; empty where there are none."""
    notes = []
    if len(columns) > 1:
        several = sum(column.model == "student" for column in columns) > 1
        whom = "the best student" if several else "the better of the two"
        notes.append(f"{BEST} {whom} in the row, to the digits shown. ↓ lower is better, ↑ higher is better.")
    over = []
    if any(len(column.reports) > 1 and column.model == "student" for column in columns):
        over.append("over the training seeds named in a column's head")
    if any(one.std is not None for c in columns if len(c.reports) == 1 for one in c.metrics.values()):
        over.append("over the seeds of the draws, in columns of one training")
    if over:
        notes.append(f"± is the standard deviation of a sample: {'; '.join(over)}.")
    if any(one.n < len(column.reports) for column in columns for one in column.metrics.values()):
        notes.append("(1 of 3): of so many of the seeds.")
    return notes


def text_table(columns: Sequence[Column], wide: int = 120) -> str:
    """The table for a terminal.

    Args:
        columns: as on the page.
        wide: if the columns' heads make it wider than this, they get numbers, and the heads are listed above.
    """
    rows = [row for row in rows_of(columns) if row.metric.group != OTHER]
    first = max([len(row.metric.head) + 2 for row in rows], default=0)
    names = [(column.label, column.note) for column in columns]
    lines = []
    if first + sum(max(map(len, name)) + 4 for name in names) > wide:
        lines = [f"[{i}] {label}{f' ({note})' if note else ''}" for i, (label, note) in enumerate(names, start=1)]
        names = [(f"[{i}]", "") for i in range(1, len(names) + 1)]
    cells = [[f"{c} {BEST if b else ' '}" for c, b in zip(row.cells, row.best, strict=True)] for row in rows]
    heads = [[f"{text}  " for text in texts] for texts in zip(*names, strict=True)]  # the space is as wide as a star
    widths = [max(map(len, column)) for column in zip(*heads, *cells, strict=True)]

    def line(head: str, texts: Sequence[str]) -> str:
        fields = "".join(f"  {text:>{width}}" for text, width in zip(texts, widths, strict=True))
        return f"{head:<{first}}{fields}".rstrip()

    lines += filter(None, (line("", texts) for texts in heads))
    for group, members in groupby(zip(rows, cells, strict=True), key=lambda pair: pair[0].metric.group):
        lines += [group, *(line(f"  {row.metric.head}", texts) for row, texts in members)]
    return "\n".join([*lines, *notes_on(columns)])
