"""Compare several test runs in one page and one table; runs that differ only in the seed give mean ± standard deviation.

Run: python tools/compare_runs.py runs/kd runs/minillm/version_3 --out compare.html

A RUN is the folder of a test (`runs/kd/version_1`), its report.json, a folder with several of them, or the folder of a training
run next to those of its tests. A test without a checkpoint shows the student before training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lit_distill.files import write_text
from lit_distill.report.page import render_page, text_card
from lit_distill.report.record import find_reports


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the reports, print the table, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="a run's folder, a report.json, or a folder of several"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("compare.html"), help="HTML file to write; compare.html by default"
    )
    options = parser.parse_args(arguments)
    if options.out.is_dir() or options.out.suffix not in (".html", ".htm"):
        parser.error(f"--out: expected the name of an .html file, got {options.out}.")
    try:
        found = [report for place in options.runs for report in find_reports(place, "RUN")]
    except ValueError as error:
        parser.error(str(error))
    once = {
        (report["run"]["folder"], report["run"]["date"]): report for report in found
    }  # drops runs that are given twice
    reports = list(once.values())
    print(text_card(reports))
    write_text(options.out, render_page(reports))
    print(f"Page: {options.out}")


if __name__ == "__main__":
    main()
