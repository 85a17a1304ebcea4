"""`report.html`: one self-contained page without scripts that compares teacher, students and runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from lit_distill.report import texts
from lit_distill.report.columns import columns_of
from lit_distill.report.confidence import calibration, exposure_bias
from lit_distill.report.parts import Section, esc
from lit_distill.report.record import Report
from lit_distill.report.scores import by_length, training
from lit_distill.report.settings import differing, test_settings
from lit_distill.report.style import style_sheet
from lit_distill.report.table import text_table

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'"  # whatever a model has written, nothing is fetched and nothing runs
)


def render_page(reports: Sequence[Report]) -> str:
    """The whole page.

    Args:
        reports: at least one; what was read from ``report.json``.
    """
    columns, notes = columns_of(reports)
    makers = (
        texts.metrics,
        texts.settings,
        calibration,
        exposure_bias,
        by_length,
        texts.judge,
        training,
        texts.samples,
        texts.others,
    )
    sections = [section for make in makers if (section := make(columns))] + [_reproduce(reports)]
    tested = [test_settings(report) for report in reports]
    if keys := list(differing(tested)):
        where = f"{', '.join(keys[:6])}{' …' if len(keys) > 6 else ''}"
        notes.insert(0, f"Not all of these runs were tested alike: {where} differ. Compare with care.")
    title = _title(reports)
    warnings = "".join(f'<p class="warning">{esc(note)}</p>' for note in notes)
    links = "".join(f'<li><a href="#{section.anchor}">{esc(section.title)}</a></li>' for section in sections)
    body = "".join(f'<section><h2 id="{s.anchor}">{esc(s.title)}</h2>{s.body}</section>' for s in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{esc(title)}</title>
<style>{style_sheet()}</style>
</head>
<body>
<header><h1>{esc(title)}</h1>{_facts(reports)}{warnings}<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main>{body}</main>
<footer>Written by lit-distill. The numbers behind this page are in report.json.</footer>
</body>
</html>
"""


def text_card(reports: Sequence[Report]) -> str:
    """The table of the page and its notes, for a terminal."""
    columns, notes = columns_of(reports)
    return "\n".join([text_table(columns), *notes])


def _title(reports: Sequence[Report]) -> str:
    names = list(dict.fromkeys(str(report["run"].get("name")) for report in reports))
    shown = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
    return f"Test of {shown}" if len(reports) == 1 else f"{len(reports)} tests of {shown}"


def _facts(reports: Sequence[Report]) -> str:
    def unique(values: Sequence[object]) -> str:
        return "; ".join(dict.fromkeys(str(value) for value in values if value is not None)) or "none"

    checkpoints = [r["checkpoint"] and f"{r['checkpoint']['path']} (step {r['checkpoint']['step']})" for r in reports]
    facts = {
        "tested": _when(reports),
        "student": unique([report["student"].get("path") for report in reports]),
        "teacher": unique([(report["teacher"] or {}).get("path") for report in reports]),
        "checkpoint": unique(checkpoints) if len(reports) == 1 else "",
        "seed": unique([report["run"].get("seed") for report in reports]) if len(reports) == 1 else "",
    }
    rows = "".join(f"<dt>{name}</dt><dd>{esc(value)}</dd>" for name, value in facts.items() if value)
    return f'<dl class="facts">{rows}</dl>'


def _when(reports: Sequence[Report]) -> str:
    days = sorted(str(report["run"].get("date"))[:16].replace("T", " ") for report in reports)
    return days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"


def _reproduce(reports: Sequence[Report]) -> Section:
    lines = []
    for report in reports:
        folder, checkpoint = str(report["run"].get("folder")), report["checkpoint"]
        if checkpoint and report.get("training_config"):
            lines.append(_command("fit", Path(checkpoint["folder"]), report))
        if report.get("config"):
            lines.append(_command("test", Path(folder), report))
        else:
            lines.append(f"# {folder}: tested without a configuration file")
    commands = "\n".join(dict.fromkeys(lines))
    note = (
        '<p class="note">The whole configuration of each run, its seed and checkpoint included, lies in its folder.</p>'
    )
    return Section("reproduce", "How to reproduce this", f"{note}<pre>{esc(commands)}</pre>")


def _command(stage: str, folder: Path, report: Report) -> str:
    name = str(report["run"].get("name"))  # else the new run would be named after the file
    return shlex.join(["lit-distill", stage, "--config", str(folder / "config.yaml"), "--run_name", name])
