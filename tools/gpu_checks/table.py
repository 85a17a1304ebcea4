"""Result table: rows with a value, a limit and a verdict. A check that raises becomes a failed row; the others still run."""

from __future__ import annotations

import math
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

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


Line = TypeVar("Line")


class Lines(ABC, Generic[Line]):
    """Collects and prints lines, each at once. A measurement that raises becomes a failed line, and the others still run."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.tracebacks: list[str] = []

    @abstractmethod
    def add(self, line: Line, name: str, seconds: float) -> None:
        """Add a line of the measurement ``name``, ``seconds`` after the line before, and print it."""

    @abstractmethod
    def failure(self, note: str) -> Line:
        """The line of a measurement that raised."""

    def run(self, name: str, measure: Callable[[], Iterable[Line]]) -> None:
        """Add the lines of a measurement; an exception becomes a failed line."""
        since = time.perf_counter()
        try:
            for line in measure():
                self.add(line, name, round(time.perf_counter() - since, 2))
                since = time.perf_counter()
        except Exception as error:  # noqa: BLE001 - any exception: the other measurements still run
            message = (str(error).strip() or repr(error)).splitlines()[0][:200]
            line = self.failure(f"{type(error).__name__}: {message}")
            self.add(line, name, round(time.perf_counter() - since, 2))
            self.tracebacks.append(f"--- {name}\n{traceback.format_exc()}")

    def records(self) -> list[dict[str, Any]]:
        """The lines as plain dictionaries."""
        return [asdict(line) for line in self.lines]  # type: ignore[call-overload]

    def print_tracebacks(self) -> None:
        """Print those of the measurements that raised to standard error."""
        for text in self.tracebacks:
            print(text, file=sys.stderr)


class Table(Lines[Row]):
    """The rows of all checks."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.lines
        self._print(HEADS)

    @property
    def failed(self) -> bool:
        """Whether any row failed."""
        return any(row.verdict == "fail" for row in self.rows)

    def failure(self, note: str) -> Row:
        """See `Lines.failure`."""
        return Row("", "ran to its end", verdict="fail", note=note)

    def summary(self, seconds: float) -> str:
        """How many rows passed; the tracebacks of those that raised go to standard error."""
        self.print_tracebacks()
        count = {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in ("pass", "fail", "skipped")}
        failures = [f"failed: {row.check}: {row.what} {row.note}" for row in self.rows if row.verdict == "fail"]
        total = f"{count['pass']} passed, {count['fail']} failed, {count['skipped']} skipped in {seconds:.0f} s"
        return "\n".join([*failures, total])

    def add(self, line: Row, name: str, seconds: float) -> None:
        """See `Lines.add`."""
        line.check, line.seconds = name, seconds
        self.rows.append(line)
        cells = (name, line.what, _number(line.value), _number(line.limit), f"{seconds:.1f}", line.verdict)
        self._print(cells, line.note)

    def _print(self, cells: Iterable[str], note: str = "") -> None:
        line = " ".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
        print(f"{line} {note}".rstrip(), flush=True)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
