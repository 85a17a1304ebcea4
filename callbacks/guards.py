"""A run whose responses collapse says so, and a figure that nobody logs is found at once."""

from __future__ import annotations

from difflib import get_close_matches

from lightning.pytorch import Trainer


class CollapseWatch:
    """Says once that the responses have become empty, endless or repetitive, compared with the first ones.

    Args:
        window: phases over which figures are averaged, the first ones and the last ones.
    """

    def __init__(self, window: int = 3) -> None:
        self.window = window
        self.first: list[list[float]] = []
        self.last: list[list[float]] = []
        self.told = False

    def look(self, step: int, length: float, unfinished: float, repetition: float) -> str | None:
        """A warning, if it is time for one.

        Args:
            step: the optimiser step.
            length: mean tokens of a response.
            unfinished: share of the responses that were cut off.
            repetition: share of the tokens that repeat an earlier one at the same distance.
        """
        figures = [length, unfinished, repetition]
        if len(self.first) < self.window:
            self.first.append(figures)
            return None
        self.last = [*self.last, figures][-self.window :]
        if self.told or len(self.last) < self.window:
            return None
        (length, unfinished, repetition), now = self._means(self.first), self._means(self.last)
        signs = {
            "almost nothing is said": now[0] <= max(1.5, length / 5) and length > 3,
            "almost nothing ends by itself": now[1] >= 0.95 and unfinished < 0.6,
            "the responses repeat themselves": now[2] >= 0.5 and now[2] >= repetition + 0.3,
        }
        seen = [sign for sign, holds in signs.items() if holds]
        if not seen:
            return None
        self.told = True
        return (
            f"The rollouts have collapsed at step {step}: {' and '.join(seen)}. Of the first {self.window} phases and the last: "
            f"length {length:.1f} and {now[0]:.1f} tokens, unfinished {unfinished:.0%} and {now[1]:.0%}, repetition "
            f"{repetition:.0%} and {now[2]:.0%}. Look at rollout/samples; lower model.optimizer.lr, or give NextToken more weight."
        )

    def _means(self, phases: list[list[float]]) -> list[float]:
        return [sum(values) / len(values) for values in zip(*phases, strict=True)]


def check_monitor(monitor: str | None, trainer: Trainer) -> None:
    """After a first validation: refuse a figure that is a slip of the pen of one that was logged.

    Raises:
        ValueError: with what was probably meant.
    """
    logged = list(trainer.callback_metrics)
    if monitor is None or monitor in logged:
        return
    if close := get_close_matches(monitor, logged, n=1, cutoff=0.85):
        raise ValueError(f"checkpoint.monitor: nobody logs {monitor}. Did you mean {close[0]}?")
