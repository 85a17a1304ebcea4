"""The table of all metrics: rows for the page and lines for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from lit_distill.report.columns import Column, Summary
from lit_distill.report.metrics import OTHER, Metric, decimals_for, metric_of, number, sort_key

BEST = "★"


@dataclass(frozen=True)
class Row:
    """A metric of every column, ready to be read."""

    name: str
    metric: Metric
    cells: list[str]
    """One a column, empty where it has no such metric."""
    best: list[bool]
    """Of the compared columns."""


def rows_of(columns: Sequence[Column]) -> list[Row]:
    """All metrics, in reading order; those by length of the reference have a chart of their own."""
    names = sorted({name for column in columns for name in column.metrics if not _of_a_bucket(name)}, key=sort_key)
    return [_row(name, columns) for name in names]


def _row(name: str, columns: Sequence[Column]) -> Row:
    metric = metric_of(name)
    found = [column.metrics.get(name) for column in columns]
    decimals = decimals_for(metric, [one.mean * metric.scale for one in found if one])
    cells = [_cell(one, metric, decimals, len(c.reports)) for one, c in zip(found, columns, strict=True)]
    compared = [index for index in competitors(columns) if found[index]]
    best = [False] * len(columns)
    if metric.better and len(compared) > 1:
        pick = min if metric.better == "lower" else max
        winner = number(pick(_mean(found[index]) for index in compared) * metric.scale, decimals)
        shown = {index: number(_mean(found[index]) * metric.scale, decimals) for index in compared}
        if len(set(shown.values())) > 1:  # what looks the same is the same
            best = [shown.get(index) == winner for index in range(len(columns))]
    return Row(name, metric, cells, best)


def competitors(columns: Sequence[Column]) -> list[int]:
    """Who can be best: the students among themselves; a lone student and its teacher."""
    students = [index for index, column in enumerate(columns) if column.model == "student"]
    return students if len(students) > 1 else list(range(len(columns)))


def _mean(summary: Summary | None) -> float:
    assert summary is not None
    return summary.mean


def _cell(summary: Summary | None, metric: Metric, decimals: int, num_reports: int) -> str:
    if summary is None:
        return ""
    mean = number(summary.mean * metric.scale, decimals)
    spread = "" if summary.std is None else f" ± {number(summary.std * metric.scale, decimals)}"
    some_lack_it = f" ({summary.n} of {num_reports})" if summary.n < num_reports else ""
    return mean + spread + some_lack_it


def _of_a_bucket(name: str) -> bool:
    return name.endswith("_words") and "/" in name


def spread_note(columns: Sequence[Column]) -> str:
    """What ± means in this table; empty where there is none."""
    over = []
    if any(len(column.reports) > 1 and column.model == "student" for column in columns):
        over.append("the training seeds named in a column's head")
    if any(
        len(column.reports) == 1 and any(one.std is not None for one in column.metrics.values()) for column in columns
    ):
        over.append("the seeds of the draws, in columns of one training")
    note = f"± is the standard deviation of a sample: over {'; over '.join(over)}." if over else ""
    partly = any(one.n < len(column.reports) for column in columns for one in column.metrics.values())
    return f"{note} (1 of 3): of so many of the seeds." if partly else note


def best_note(columns: Sequence[Column]) -> str:
    """What the star means; empty where nothing is compared."""
    if len(columns) < 2:
        return ""
    students = sum(column.model == "student" for column in columns)
    whom = "the best student" if students > 1 else "the better of the two"
    return f"{BEST} {whom} in the row, to the digits shown. ↓ lower is better, ↑ higher is better."


def text_table(columns: Sequence[Column], wide: int = 120) -> str:
    """The table for a terminal.

    Args:
        columns: as on the page.
        wide: if the columns' heads make it wider than this, they get numbers, and the heads are listed above.
    """
    rows = [row for row in rows_of(columns) if row.metric.group != OTHER]
    heads = [f"{row.metric.head} {row.metric.arrow}".strip() for row in rows]
    first = max([len(head) + 2 for head in heads], default=0)
    cells = [[f"{c} {BEST if b else ' '}" for c, b in zip(row.cells, row.best, strict=True)] for row in rows]
    above: list[str] = []
    names = [(column.label, column.note) for column in columns]
    if first + sum(max(map(len, name)) + 4 for name in names) > wide:
        above = [f"[{i}] {label}{f' ({note})' if note else ''}" for i, (label, note) in enumerate(names, start=1)]
        names = [(f"[{i}]", "") for i in range(1, len(names) + 1)]
    marked = [(f"{label}  ", f"{note}  ") for label, note in names]  # as wide as a star
    widths = [max(len(text) for text in (*marked[i], *(line[i] for line in cells))) for i in range(len(columns))]

    def line(head: str, texts: Sequence[str]) -> str:
        fields = "".join(f"  {text:>{width}}" for text, width in zip(texts, widths, strict=True))
        return f"{head:<{first}}{fields}".rstrip()

    lines = [*above, *filter(None, (line("", names) for names in zip(*marked, strict=True)))]
    for group, members in groupby(range(len(rows)), key=lambda index: rows[index].metric.group):
        lines += [group, *(line(f"  {heads[index]}", cells[index]) for index in members)]
    return "\n".join([*lines, *filter(None, (best_note(columns), spread_note(columns)))])
