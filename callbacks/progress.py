"""How far a run has come: one line that fits the terminal, or now and then a line of a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override


class RunProgress(TQDMProgressBar):
    """Optimiser steps, loss and speed; the figures of every validation stay on the screen.

    Where nobody watches (standard output is no terminal), there is no bar but a line every few seconds.

    Args:
        seconds_between_lines: without a terminal, the least time between two lines.
    """

    def __init__(self, seconds_between_lines: float = 30.0) -> None:
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else 0)
        self.seconds_between_lines = seconds_between_lines
        self._last_line = (time.monotonic(), 0)

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands beside the bar."""
        figures = super().get_metrics(trainer, pl_module)
        figures.pop("v_num", None)  # the run's folder is said at the end
        return {"step": _step(trainer), **figures}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._last_line = (time.monotonic(), trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, or print a line if it is time."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        now, (then, step) = time.monotonic(), self._last_line
        if self.is_disabled and now - then >= self.seconds_between_lines:
            speed = (trainer.global_step - step) / (now - then)
            self._say(f"step {_step(trainer)}: {_figures(trainer.progress_bar_metrics)} · {speed:.2f} steps/s")
            self._last_line = (now, trainer.global_step)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the figures on the screen."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            every = trainer.callback_metrics.items()
            figures = {name.removeprefix("val/"): value for name, value in every if name.startswith("val/")}
            self._say(f"validation at step {_step(trainer)}: {_figures(figures)}")

    def _say(self, text: str) -> None:
        if self.is_disabled:
            rank_zero_info(text)
        else:
            self.print(text)


def _step(trainer: Trainer) -> str:
    total = trainer.max_steps
    return f"{trainer.global_step}/{total}" if total and total > 0 else str(trainer.global_step)


def _figures(figures: Any) -> str:
    return " · ".join(f"{name} {float(value):.4g}" for name, value in figures.items())
