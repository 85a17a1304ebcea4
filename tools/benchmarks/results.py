"""Results of the benchmark: numbers, goals and verdicts, and the Markdown table of them.

A row of `gpu_checks.table.Table` has one value. Here it has two numbers, ours and the peer's, and their ratio.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gpu_checks.table import Lines

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


class Results(Lines[Result]):
    """The lines of all rows.

    Args:
        judged: whether goals are judged; tiny sizes say nothing about them.
    """

    def __init__(self, judged: bool = True) -> None:
        super().__init__()
        self.judged = judged
        print(_line(HEADS))
        print(_line(["---"] * len(HEADS)), flush=True)

    @property
    def failed(self) -> bool:
        """Whether a row raised. A goal that is missed is a result like another."""
        return any(line.verdict == "failed" for line in self.lines)

    def failure(self, note: str) -> Result:
        """See `Lines.failure`."""
        return Result("", "ran to its end", verdict="failed", note=note)

    def summary(self, seconds: float) -> str:
        """How many goals were met; the tracebacks of rows that raised go to standard error."""
        self.print_tracebacks()
        words = ("met", "missed", "measured", "skipped", "failed")
        count = {word: sum(line.verdict == word for line in self.lines) for word in words}
        return ", ".join(f"{number} {word}" for word, number in count.items()) + f" in {seconds:.0f} s"

    def add(self, line: Result, name: str, seconds: float) -> None:
        """See `Lines.add`."""
        line.row, line.seconds = name, seconds
        if not self.judged and line.verdict in {"met", "missed"}:
            line.verdict = "measured"
        self.lines.append(line)
        print(_line(_cells(asdict(line))), flush=True)


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
