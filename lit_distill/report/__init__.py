"""What a test leaves behind: a record in JSON, and a page that compares records."""

from lit_distill.report.page import render_page, text_card
from lit_distill.report.record import (
    Report,
    find_reports,
    jsonable,
    make_report,
    read_config,
    read_report,
    write_report,
)

__all__ = [
    "Report",
    "find_reports",
    "jsonable",
    "make_report",
    "read_config",
    "read_report",
    "render_page",
    "text_card",
    "write_report",
]
