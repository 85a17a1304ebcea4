"""Result table: rows with a value, a limit and a verdict. A check that raises becomes a failed row; the others still run."""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

WIDTHS = (22, 70, 10, 7, 5, 8)
HEADS = ("check", "what", "value", "limit", "s", "verdict")


@dataclass
class Row:
    """One line of the table."""

    check: str
    what: str
    value: float | None = None
    limit: float | None = None
    verdict: str = "measured"
    """pass, fail, measured (there is no limit) or skipped."""
    note: str = ""
    seconds: float = 0.0
    """Time since the previous row."""


def below(what: str, value: float, limit: float, note: str = "") -> Row:
    """A row that passes if the value is finite and at most the limit."""
    return Row("", what, value, limit, "pass" if math.isfinite(value) and value <= limit else "fail", note)


def holds(what: str, claim: bool, note: str = "") -> Row:
    """A row that passes if a claim is true."""
    return Row("", what, verdict="pass" if claim else "fail", note=note)


def measured(what: str, value: float, note: str = "") -> Row:
    """A row without a limit."""
    return Row("", what, value, note=note)


def skipped(what: str, why: str) -> Row:
    """A row for a check that was skipped, with the reason."""
    return Row("", what, verdict="skipped", note=why)


class Table:
    """Collects the rows and prints each one immediately."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.tracebacks: list[str] = []
        self._print(HEADS)

    @property
    def failed(self) -> bool:
        """Whether any row failed."""
        return any(row.verdict == "fail" for row in self.rows)

    def run(self, name: str, check: Callable[[], Iterable[Row]]) -> None:
        """Add the rows of a check; an exception becomes a failed row."""
        since = time.perf_counter()
        try:
            for row in check():
                row.check, row.seconds = name, round(time.perf_counter() - since, 2)
                since = time.perf_counter()
                self._add(row)
        except Exception as error:  # noqa: BLE001 - any exception: the other checks still run
            message = (str(error).strip() or repr(error)).splitlines()[0][:200]
            seconds = round(time.perf_counter() - since, 2)
            self._add(Row(name, "ran to its end", None, None, "fail", f"{type(error).__name__}: {message}", seconds))
            self.tracebacks.append(f"--- {name}\n{traceback.format_exc()}")

    def records(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries."""
        return [asdict(row) for row in self.rows]

    def summary(self, seconds: float) -> str:
        """How many rows passed; the tracebacks of those that raised go to standard error."""
        for text in self.tracebacks:
            print(text, file=sys.stderr)
        count = {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in ("pass", "fail", "skipped")}
        failures = [f"failed: {row.check}: {row.what} {row.note}" for row in self.rows if row.verdict == "fail"]
        total = f"{count['pass']} passed, {count['fail']} failed, {count['skipped']} skipped in {seconds:.0f} s"
        return "\n".join([*failures, total])

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self._print(
            (row.check, row.what, _number(row.value), _number(row.limit), f"{row.seconds:.1f}", row.verdict), row.note
        )

    def _print(self, cells: Iterable[str], note: str = "") -> None:
        line = " ".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
        print(f"{line} {note}".rstrip(), flush=True)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
