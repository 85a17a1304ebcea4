"""Results of the benchmark: numbers, goals and verdicts, and the Markdown table of them.

`gpu_checks.table` has one value a row. Here a row has two numbers, ours and the peer's, and their ratio.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.measure import ratio

HEADS = ("row", "what", "ours", "peer", "ratio", "goal", "verdict", "work and notes")
SIGNS = {"at most": "≤", "at least": "≥"}


@dataclass(frozen=True)
class Goal:
    """What a number should be."""

    kind: Literal["at most", "at least"]
    bound: float

    def __str__(self) -> str:
        return f"{SIGNS[self.kind]} {self.bound:g}"

    def judge(self, value: float) -> Literal["met", "missed"]:
        """Whether ``value`` is within the bound; NaN is not."""
        within = value <= self.bound if self.kind == "at most" else value >= self.bound
        return "met" if math.isfinite(value) and within else "missed"


@dataclass
class Result:
    """One line of the table."""

    row: str
    """Id of the row."""
    what: str
    ours: float | None = None
    peer: float | None = None
    unit: str = "s"
    """Of ours and peer."""
    ratio: float | None = None
    """Median of the ratios of the rounds."""
    ratio_of: Literal["ours/peer", "peer/ours"] = "peer/ours"
    """Ours/peer if the goal is `at most`, else peer/ours: how many times as fast ours is."""
    goal: str = ""
    verdict: str = "measured"
    """met, missed, measured (there is no goal, or it is not judged), skipped, failed."""
    note: str = ""
    seconds: float = 0.0
    """Time since the line before."""


def at_most(bound: float) -> Goal:
    """A goal for a number that should be small."""
    return Goal("at most", bound)


def at_least(bound: float) -> Goal:
    """A goal for a number that should be large."""
    return Goal("at least", bound)


def compared(
    what: str, ours: Sequence[float], peer: Sequence[float], goal: Goal | None = None, note: str = "", unit: str = "s"
) -> Result:
    """Ours beside a peer: medians, and the median of the ratios of each round.

    Args:
        what: is measured, and against what.
        ours: one number a round.
        peer: one number a round.
        goal: for ours / peer if it is `at most`, for peer / ours if it is `at least`; None does not judge peer / ours.
        note: work counted, and remarks.
        unit: of the numbers.
    """
    small = goal is not None and goal.kind == "at most"
    value = ratio(ours, peer) if small else ratio(peer, ours)
    verdict = "measured" if goal is None else goal.judge(value)
    medians = statistics.median(ours), statistics.median(peer)
    of: Literal["ours/peer", "peer/ours"] = "ours/peer" if small else "peer/ours"
    return Result("", what, *medians, unit, value, of, "" if goal is None else str(goal), verdict, note)


def limited(what: str, value: float, unit: str, goal: Goal, note: str = "") -> Result:
    """A number of ours with a goal and without a peer."""
    return Result("", what, value, unit=unit, goal=f"{goal} {unit}".strip(), verdict=goal.judge(value), note=note)


def measured(what: str, value: float, unit: str = "s", note: str = "") -> Result:
    """A number without a goal."""
    return Result("", what, value, unit=unit, note=note)


def skipped(what: str, why: str) -> Result:
    """A line that could not be measured here, with the reason."""
    return Result("", what, verdict="skipped", note=why)


class Results:
    """Collects the lines of all rows, and prints each at once. A row that raises is a failed line, and the others still run.

    Args:
        judged: whether goals are judged; tiny sizes say nothing about them.
    """

    def __init__(self, judged: bool = True) -> None:
        self.judged = judged
        self.lines: list[Result] = []
        self.tracebacks: list[str] = []
        print(_line(HEADS))
        print(_line(["---"] * len(HEADS)), flush=True)

    def run(self, row: str, measure: Callable[[], Iterable[Result]]) -> None:
        """Add the lines of a row."""
        since = time.perf_counter()
        try:
            for result in measure():
                result.row, result.seconds = row, round(time.perf_counter() - since, 2)
                since = time.perf_counter()
                self._add(result)
        except Exception as error:  # noqa: BLE001 - any exception: the other rows still run
            message = (str(error).strip() or repr(error)).splitlines()[0][:200]
            seconds = round(time.perf_counter() - since, 2)
            note = f"{type(error).__name__}: {message}"
            self._add(Result(row, "ran to its end", verdict="failed", note=note, seconds=seconds))
            self.tracebacks.append(f"--- {row}\n{traceback.format_exc()}")

    @property
    def failed(self) -> bool:
        """Whether a row raised. A goal that is missed is a result like another."""
        return any(line.verdict == "failed" for line in self.lines)

    def records(self) -> list[dict[str, Any]]:
        """The lines as plain dictionaries."""
        return [asdict(line) for line in self.lines]

    def summary(self, seconds: float) -> str:
        """How many goals were met; the tracebacks of rows that raised go to standard error."""
        for text in self.tracebacks:
            print(text, file=sys.stderr)
        words = ("met", "missed", "measured", "skipped", "failed")
        count = {word: sum(line.verdict == word for line in self.lines) for word in words}
        return ", ".join(f"{number} {word}" for word, number in count.items()) + f" in {seconds:.0f} s"

    def _add(self, result: Result) -> None:
        if not self.judged and result.verdict in {"met", "missed"}:
            result.verdict = "measured"
        self.lines.append(result)
        print(_line(_cells(asdict(result))), flush=True)


def markdown(record: Mapping[str, Any]) -> str:
    """The table of a stored run, below its date, machine and versions."""
    how = "tiny sizes, no goals judged" if record["quick"] else f"medians of {record['repeats']} alternating rounds"
    head = [f"{record['date']}, {record['device']}, {how}", "", record["versions"], ""]
    table = [_line(HEADS), _line(["---"] * len(HEADS)), *(_line(_cells(line)) for line in record["rows"])]
    return "\n".join([*head, *table])


def _cells(line: Mapping[str, Any]) -> list[str]:
    numbers = [
        _number(line["ours"], line["unit"]),
        _number(line["peer"], line["unit"]),
        _number(line["ratio"], line["ratio_of"]),
    ]
    return [line["row"], line["what"], *numbers, line["goal"], line["verdict"], line["note"]]


def _number(value: float | None, unit: str) -> str:
    return (
        "" if value is None else f"{value:.3g} {unit}".strip() if abs(value) < 1000 else f"{value:,.0f} {unit}".strip()
    )


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
