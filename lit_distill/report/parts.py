"""What every section of the page is made of."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from lit_distill.report.charts import swatch
from lit_distill.report.columns import Column
from lit_distill.report.svg import Drawing, printable


class Section(NamedTuple):
    """A part of the page."""

    anchor: str
    title: str
    body: str
    """HTML."""


def esc(text: object) -> str:
    """``text`` as HTML that shows it and does nothing else."""
    return escape(printable(str(text)))


def figure(drawing: Drawing, caption: str, note: str = "") -> str:
    """A chart with what it shows above it."""
    small = f"<small>{esc(note)}</small>" if note else ""
    return f"<figure><figcaption>{esc(caption)}{small}</figcaption>{drawing}</figure>"


def legend(columns: Sequence[Column]) -> str:
    """Whose line is whose."""
    entries = (
        f'<li><span aria-hidden="true">{swatch(column.style)}</span>{esc(column.label)}</li>' for column in columns
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'
