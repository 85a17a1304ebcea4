"""`report.html`: one self-contained page without scripts that compares teacher, students and runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from lit_distill.report import sections
from lit_distill.report.columns import columns_of
from lit_distill.report.figures import draw_swatch, make_figure, renumbered, svg
from lit_distill.report.metrics import ARROWS, NOTHING
from lit_distill.report.record import Report
from lit_distill.report.sections import Block, Drawing, Section
from lit_distill.report.settings import differing, test_settings
from lit_distill.report.table import BEST, text_table

UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]")


def render_page(reports: Sequence[Report]) -> str:
    """The whole page.

    Args:
        reports: at least one; what was read from ``report.json``.
    """
    columns, notes = columns_of(reports)
    makers = (
        *(sections.metrics, sections.settings, sections.calibration, sections.exposure_bias, sections.by_length),
        *(sections.judge, sections.training, sections.samples, sections.others),
    )
    shown = [section for make in makers if (section := make(columns)).blocks] + [_reproduce(reports)]
    if keys := list(differing([test_settings(report) for report in reports])):
        where = f"{', '.join(keys[:6])}{' …' if len(keys) > 6 else ''}"
        notes.insert(0, f"Not all of these runs were tested alike: {where} differ. Compare with care.")
    numbers = count(1)

    def picture(drawing: Drawing) -> Markup:
        figure = make_figure(drawing.draw, drawing.width, drawing.height)
        return Markup(svg(figure, escape(printable(drawing.alt)), next(numbers)))  # noqa: S704 - matplotlib's own text

    @cache
    def drawn_swatch(style: int) -> str:
        return svg(make_figure(lambda figure: draw_swatch(figure.subplots(), style), 34, 14), "", 0)

    def swatch(style: int) -> Markup:
        return Markup(renumbered(drawn_swatch(style), next(numbers)))  # noqa: S704 - matplotlib's own text

    here = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    here.globals |= {"picture": picture, "swatch": swatch, "arrows": ARROWS, "nothing": NOTHING, "star": BEST}
    page = here.get_template("page.html.jinja")
    return page.render(title=_title(reports), facts=_facts(reports), warnings=notes, sections=shown)


def printable(value: Any) -> Any:
    """Text with a replacement character for what HTML cannot hold, and for what would reverse the text around it."""
    return UNPRINTABLE.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def text_card(reports: Sequence[Report]) -> str:
    """The table of the page and its notes, for a terminal."""
    columns, notes = columns_of(reports)
    return "\n".join([text_table(columns), *notes])


def _title(reports: Sequence[Report]) -> str:
    names = list(dict.fromkeys(str(report["run"].get("name")) for report in reports))
    shown = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
    return f"Test of {shown}" if len(reports) == 1 else f"{len(reports)} tests of {shown}"


def _facts(reports: Sequence[Report]) -> dict[str, str]:
    def unique(values: Sequence[object]) -> str:
        return "; ".join(dict.fromkeys(str(value) for value in values if value is not None)) or "none"

    days = sorted(str(report["run"].get("date"))[:16].replace("T", " ") for report in reports)
    facts = {
        "tested": " to ".join(dict.fromkeys((days[0], days[-1]))),
        "student": unique([report["student"].get("path") for report in reports]),
        "teacher": unique([(report["teacher"] or {}).get("path") for report in reports]),
    }
    if len(reports) == 1:
        checkpoint = reports[0]["checkpoint"]
        facts["checkpoint"] = f"{checkpoint['path']} (step {checkpoint['step']})" if checkpoint else "none"
        facts["seed"] = unique([reports[0]["run"].get("seed")])
    return facts


def _reproduce(reports: Sequence[Report]) -> Section:
    lines = []
    for report in reports:
        folder, checkpoint = str(report["run"].get("folder")), report["checkpoint"]
        if checkpoint and report.get("training_config"):
            lines.append(_command("fit", checkpoint["folder"], report))
        tested = report.get("config")
        lines.append(_command("test", folder, report) if tested else f"# {folder}: tested without a configuration file")
    note = "The whole configuration of each run, its seed and checkpoint included, lies in its folder."
    return Section("reproduce", "How to reproduce this", [Block(code="\n".join(dict.fromkeys(lines)))], note)


def _command(stage: str, folder: str, report: Report) -> str:
    name = str(report["run"].get("name"))  # else the new run would be named after the file
    return shlex.join(["lit-distill", stage, "--config", str(Path(folder) / "config.yaml"), "--run_name", name])
