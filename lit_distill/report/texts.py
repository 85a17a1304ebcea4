"""The sections of the page that hold tables and text; all text in them comes from outside and is escaped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lit_distill.report.columns import Column
from lit_distill.report.metrics import KNOWN, NOTHING, decimals_for, metric_of, number
from lit_distill.report.parts import Section, esc
from lit_distill.report.settings import differing, method_settings, test_settings
from lit_distill.report.table import BEST, Row, best_note, rows_of, spread_note

SHOWN = ("calibration", "exposure_bias", "generation", "judge")
LONGEST = 4000
"""Characters of a text on the page; the whole text is in the record."""
MOST_SETTINGS = 40
MOST_SAMPLES = 12


def scroll(table: str, label: str) -> str:
    """A table that scrolls inside its own box, by keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(label)}">{table}</div>'


def _head(column: Column, note: str = "") -> str:
    label = esc(column.label).replace("_", "_<wbr>")  # names of runs are long and have no spaces
    return f'<th scope="col">{label}{f"<small>{esc(note)}</small>" if note else ""}</th>'


def metrics(columns: Sequence[Column]) -> Section | None:
    """The table of all metrics."""
    rows = rows_of(columns)
    if not rows:
        return None
    heads = "".join(_head(column, column.note) for column in columns)
    bodies = []
    for group, members in groupby(rows, key=lambda row: row.metric.group):
        lines = "".join(_line(row) for row in members)
        span = f'<th scope="rowgroup" colspan="{len(columns) + 1}"><span>{esc(group)}</span></th>'
        bodies.append(f'<tbody><tr class="group">{span}</tr>{lines}</tbody>')
    caption = '<caption class="hidden">Metrics on the test data, one column for each model</caption>'
    table = f'<table>{caption}<thead><tr><th scope="col">figure</th>{heads}</tr></thead>{"".join(bodies)}</table>'
    notes = " ".join(filter(None, (best_note(columns), spread_note(columns))))
    note = f'<p class="note">{esc(notes)}</p>' if notes else ""
    return Section("metrics", "Metrics on the test data", note + scroll(table, "Metrics on the test data"))


def _line(row: Row) -> str:
    unit = f'<span class="unit">, {esc(row.metric.unit)}</span>' if row.metric.unit else ""
    arrow = f'&nbsp;<span aria-hidden="true">{row.metric.arrow}</span>' if row.metric.arrow else ""
    hidden = f'<span class="hidden"> ({row.metric.better} is better)</span>' if row.metric.better else ""
    cells = "".join(_cell(text, best) for text, best in zip(row.cells, row.best, strict=True))
    return f'<tr><th scope="row">{esc(row.metric.label)}{unit}{arrow}{hidden}</th>{cells}</tr>'


def _cell(text: str, best: bool) -> str:
    if not text:
        return f'<td><span class="unit" aria-label="not measured">{NOTHING}</span><span class="star"></span></td>'
    star = (
        f'<span class="star" aria-hidden="true">{BEST}</span><span class="hidden"> best</span>'
        if best
        else '<span class="star"></span>'
    )
    return f"<td{' class=best' if best else ''}>{esc(text)}{star}</td>"


def settings(columns: Sequence[Column]) -> Section | None:
    """In which settings the students' trainings and tests differ."""
    students = [column for column in columns if column.model == "student"]
    trained = [column for column in students if column.reports[0]["checkpoint"]]
    blocks = []
    for title, shown, read in (
        ("Trainings", trained, method_settings),
        ("Tests: metrics of columns that were not tested alike are not comparable", students, test_settings),
    ):
        rows = differing([read(column.reports[0]) for column in shown])
        if rows:
            blocks.append(f"<h3>{esc(title)}</h3>" + _settings_table(title, shown, rows))
    return Section("settings", "Where the runs' settings differ", "".join(blocks)) if blocks else None


def _settings_table(title: str, columns: Sequence[Column], rows: dict[str, list[str]]) -> str:
    heads = "".join(_head(column) for column in columns)
    lines = "".join(
        f'<tr><th scope="row"><code>{esc(key)}</code></th>'
        + "".join(f"<td>{esc(value) or NOTHING}</td>" for value in values)
        + "</tr>"
        for key, values in list(rows.items())[:MOST_SETTINGS]
    )
    more = f'<p class="note">And {len(rows) - MOST_SETTINGS} more.</p>' if len(rows) > MOST_SETTINGS else ""
    caption = f'<caption class="hidden">{esc(title)}</caption>'
    table = f'<table class="words">{caption}<thead><tr><th scope="col">key</th>{heads}</tr></thead><tbody>{lines}</tbody></table>'
    return scroll(table, title) + more


def samples(columns: Sequence[Column]) -> Section | None:
    """Answers of every model to the same prompts, beside the reference."""
    said: dict[str, dict[str, str]] = {}
    known: dict[str, dict[str, Any]] = {}
    for column in columns:
        for sample in (s for entry in column.entries("generation")[:1] for s in entry.get("samples") or []):
            identity = json.dumps([sample["id"], sample["prompt"]])
            known.setdefault(identity, sample)
            said.setdefault(identity, {})[column.label] = sample["response"]
    if not said:
        return None
    widest = sorted(said, key=lambda identity: -len(said[identity]))[
        :MOST_SAMPLES
    ]  # those that all have answered first
    articles = []
    for identity in widest:
        sample = known[identity]
        answers = [("reference", sample.get("reference") or ""), *said[identity].items()]
        cells = "".join(f"<div><h4>{esc(who)}</h4>{_said(text)}</div>" for who, text in answers)
        prompt = f'<div class="prompt">{_said(sample["prompt"])}</div>'
        articles.append(f'<article><h3>{esc(sample["id"])}</h3>{prompt}<div class="answers">{cells}</div></article>')
    several = any(len(column.reports) > 1 for column in columns if column.model == "student")
    note = '<p class="note">Of a column with several seeds, the answer of the first.</p>' if several else ""
    return Section("samples", "Responses side by side", note + "".join(articles))


def _said(text: str) -> str:
    if not text.strip():
        return '<p class="said empty">(empty)</p>'
    cut = f"{text[:LONGEST]}\n… {len(text) - LONGEST:,} more characters in report.json" if len(text) > LONGEST else text
    return f'<p class="said" dir="auto">{esc(cut)}</p>'


def judge(columns: Sequence[Column]) -> Section | None:
    """How a judge was asked, and what it cost; its scores are among the metrics."""
    asked = [(column, entry) for column in columns for entry in column.entries("judge")]
    if not asked:
        return None
    keys = [
        key
        for key in dict.fromkeys(key for _, entry in asked for key in entry)
        if f"judge_{key}" not in KNOWN and all(isinstance(e.get(key), (int, float, str, type(None))) for _, e in asked)
    ]
    heads = "".join(_head(column, note) for column, note in _columns_of_entries(asked))
    lines = "".join(
        f'<tr><th scope="row">{esc(key.replace("_", " "))}</th>'
        + "".join(f"<td>{esc(_value(entry.get(key)))}</td>" for _, entry in asked)
        + "</tr>"
        for key in keys
    )
    caption = '<caption class="hidden">What the judge said and what it was asked</caption>'
    table = f'<table>{caption}<thead><tr><th scope="col">judge</th>{heads}</tr></thead><tbody>{lines}</tbody></table>'
    return Section("judge", "Judge", scroll(table, "Judge"))


def _columns_of_entries(asked: Sequence[tuple[Column, Any]]) -> list[tuple[Column, str]]:
    """Each entry's column, with a number where a column has several."""
    labels = [column.label for column, _ in asked]
    return [
        (column, f"{labels[: index + 1].count(column.label)} of {labels.count(column.label)}")
        if labels.count(column.label) > 1
        else (column, "")
        for index, (column, _) in enumerate(asked)
    ]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return NOTHING if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else number(value, decimals_for(metric_of(""), [value]))


def others(columns: Sequence[Column]) -> Section | None:
    """Sections of callbacks that this page has no chart for, as they are."""
    blocks = []
    for column in (column for column in columns if column.model == "student"):
        for report in column.reports:
            for name, entries in report["sections"].items():
                if name not in SHOWN:
                    head = f"{name}: {column.label}, {report['run'].get('folder')}"
                    text = json.dumps(entries, indent=1, ensure_ascii=False)
                    blocks.append(f"<details><summary>{esc(head)}</summary><pre>{esc(text)}</pre></details>")
    return Section("more", "Other reports", "".join(blocks)) if blocks else None
