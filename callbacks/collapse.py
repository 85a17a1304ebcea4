"""Detects rollouts that collapse, and a monitored metric whose name is misspelt."""

from __future__ import annotations

from difflib import get_close_matches

from lightning.pytorch import Trainer


class CollapseDetector:
    """Warns once when responses have become empty, unfinished or repetitive, compared with the first ones.

    Args:
        window: number of phases over which the first and the latest metrics are averaged.
    """

    def __init__(self, window: int = 3) -> None:
        self.window = window
        self.first: list[list[float]] = []
        self.last: list[list[float]] = []
        self.warned = False

    def check(self, step: int, length: float, unfinished: float, repetition: float) -> str | None:
        """Add the metrics of a phase; returns a warning the first time that the responses have collapsed.

        Args:
            step: the optimiser step.
            length: mean tokens of a response.
            unfinished: share of the responses that were cut off.
            repetition: largest share of tokens that equal the token at a fixed distance before.
        """
        metrics = [length, unfinished, repetition]
        if len(self.first) < self.window:
            self.first.append(metrics)
            return None
        self.last = [*self.last, metrics][-self.window :]
        if self.warned or len(self.last) < self.window:
            return None
        (length, unfinished, repetition), now = self._means(self.first), self._means(self.last)
        signs = {
            "responses are almost empty": now[0] <= max(1.5, length / 5) and length > 3,
            "almost no response ends before max_new_tokens": now[1] >= 0.95 and unfinished < 0.6,
            "responses repeat themselves": now[2] >= 0.5 and now[2] >= repetition + 0.3,
        }
        seen = [sign for sign, holds in signs.items() if holds]
        if not seen:
            return None
        self.warned = True
        return (
            f"The rollouts have collapsed at step {step}: {' and '.join(seen)}. First {self.window} phases -> last {self.window}: "
            f"length {length:.1f} -> {now[0]:.1f} tokens, unfinished {unfinished:.0%} -> {now[1]:.0%}, repetition "
            f"{repetition:.0%} -> {now[2]:.0%}. Look at rollout/samples; lower model.optimizer.lr, or increase NextToken's weight."
        )

    def _means(self, phases: list[list[float]]) -> list[float]:
        return [sum(values) / len(values) for values in zip(*phases, strict=True)]


def check_monitor(monitor: str | None, trainer: Trainer) -> None:
    """After the first validation, refuse a metric that was not logged but is similar to one that was.

    Raises:
        ValueError: with the similar metric.
    """
    logged = list(trainer.callback_metrics)
    if monitor is None or monitor in logged:
        return
    if close := get_close_matches(monitor, logged, n=1, cutoff=0.85):
        raise ValueError(f"monitor: {monitor} is not logged. Did you mean {close[0]}?")
