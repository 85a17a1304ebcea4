"""The progress of a run: bars in a terminal, or a log line every few seconds."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lit_distill.distributed import data_ranks

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule
    from lit_distill.types import Batch, Trajectories

HIDDEN_METRICS = {
    *("distinct_1", "distinct_2", "distinct_3", "distinct_4", "repetition_4", "unfinished"),
    *("accuracy", "adaptive_ece", "brier", "teacher_accuracy", "teacher_adaptive_ece", "teacher_brier", "teacher_ece"),
}
"""Validation metrics that are logged but not printed, to keep the line short."""
SECONDS_BETWEEN_METRICS = 1.0
SECONDS_BETWEEN_DESCRIPTIONS = 0.1


class RunProgress(TQDMProgressBar):
    """Optimiser steps, time left, loss and response tokens per second; before the bar, what the run is doing.

    A response token counts once, even if several inner epochs train on it. The metrics of every validation stay on the screen.
    If standard output is not a terminal, a line every few seconds replaces the bar.

    Args:
        seconds_between_lines: without a terminal, the minimum time between two lines.
    """

    def __init__(self, seconds_between_lines: float = 30.0) -> None:
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else 0)
        self.seconds_between_lines = seconds_between_lines
        self._stage = ""
        self._decoding = ""
        self._decoded = 0
        self._decoding_since = 0.0
        self._has_rollouts = False
        self._metrics_at = self._described_at = 0.0
        self._start_clock(0)

    def _start_clock(self, step: int) -> None:
        self._first_step, self._since = step, time.monotonic()
        self._last_line = (self._since, step)
        self._tokens: torch.Tensor | int = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register for the progress of the decode loop."""
        super().setup(trainer, pl_module, stage)
        if trainer.is_global_zero:
            pl_module.decoding_progress = self._on_decoding_step  # type: ignore[assignment]

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the decode loop."""
        pl_module.decoding_progress = None  # type: ignore[assignment]

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the decode loop."""
        self.teardown(trainer, pl_module, "")

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The metrics beside the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the run's folder is printed at the end
        return metrics | {"tok/s": f"{self._tokens_per_second(trainer):.0f}"}

    def _tokens_per_second(self, trainer: Trainer) -> float:
        return float(self._tokens) * data_ranks(trainer).number / max(1e-9, time.monotonic() - self._since)

    @override
    def init_train_tqdm(self) -> Tqdm:
        """A bar of optimiser steps; a batch may have many."""
        return Tqdm(
            total=total_steps(self.trainer),
            initial=self.trainer.global_step,
            unit=" steps",
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            miniters=1,
            bar_format=self.BAR_FORMAT,
        )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._start_clock(trainer.global_step)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the number of the epoch."""
        self._show(f"epoch {trainer.current_epoch}", now=True)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count a new phase, for sources that generate."""
        self._stage, self._has_rollouts = f"epoch {trainer.current_epoch}", False

    def on_rollouts(self, trainer: Trainer, pl_module: DistillationModule, trajectories: Trajectories) -> None:
        """Count the generated tokens."""
        self._has_rollouts = True
        self._tokens = self._tokens + trajectories.responses.mask.sum()
        self._phase_start = trainer.global_step
        self._phase_steps = pl_module.source.steps_per_batch(len(trajectories.ids) * pl_module.data_ranks.number)

    def on_loss_terms(self, trainer: Trainer, pl_module: DistillationModule, terms: Any) -> None:
        """Move the bar after an optimiser step."""
        epochs = getattr(pl_module.source, "inner_epochs", 1)
        if self._has_rollouts and epochs > 1:
            done = trainer.global_step - self._phase_start - 1
            self._show(f"epoch {trainer.current_epoch}: inner epoch {done * epochs // self._phase_steps + 1}/{epochs}")
        bar = self.train_progress_bar
        self._show_metrics(bar, trainer, pl_module)
        bar.update(trainer.global_step - bar.n)
        self._line_if_due()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Show the metrics."""
        if not self._has_rollouts and batch.sequences is not None:
            self._tokens = self._tokens + batch.sequences.target_mask.sum()
        self._show_metrics(self.train_progress_bar, trainer, pl_module)
        self._line_if_due()

    def _show_metrics(self, bar: Tqdm, trainer: Trainer, pl_module: LightningModule) -> None:
        if not bar.disable and time.monotonic() - self._metrics_at >= SECONDS_BETWEEN_METRICS:
            bar.set_postfix(self.get_metrics(trainer, pl_module))  # waits for the device
            self._metrics_at = time.monotonic()

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Show the number of the batch and the total."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self._show(f"validation: batch {batch_idx + 1}/{self.total_val_batches_current_dataloader}")

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Show the number of the batch and the total."""
        super().on_test_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self._show(f"test: batch {batch_idx + 1}/{self.total_test_batches_current_dataloader}")

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Show the number of the batch and the total."""
        super().on_predict_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self._show(f"prediction: batch {batch_idx + 1}/{self.total_predict_batches_current_dataloader}")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics."""
        super().on_validation_end(trainer, pl_module)
        self._stage = ""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            every = {name.removeprefix("val/"): v for name, v in trainer.callback_metrics.items() if "val/" in name}
            metrics = {name: value for name, value in every.items() if name not in HIDDEN_METRICS}
            self._print(f"validation at step {_step(trainer)}: {_metrics(metrics)}")

    def _on_decoding_step(self, step: int, steps: int, rows: int) -> None:
        """Called by the decode loop: ``rows`` responses are unfinished after ``step`` of at most ``steps`` tokens."""
        if step == 0:
            self._decoded, self._decoding_since = 0, time.monotonic()
        speed = self._decoded / max(1e-9, time.monotonic() - self._decoding_since)
        finished = step == steps
        self._decoding = "" if finished else f"decoding {step}/{steps} tokens of {rows} responses, {speed:.0f} tok/s"
        self._decoded += rows
        self._show(self._stage, now=finished)

    def _show(self, stage: str, now: bool = False) -> None:
        """Describe what the run is doing, before the bar that is moving or in the next line."""
        self._stage = stage
        since = time.monotonic() - self._described_at
        if self.is_enabled and (now or since >= SECONDS_BETWEEN_DESCRIPTIONS):
            if (bar := self._moving_bar()) is not None:
                bar.set_description(" · ".join(part for part in (stage, self._decoding) if part))
            self._described_at = time.monotonic()
        self._line_if_due()

    def _moving_bar(self) -> Tqdm | None:
        trainer = self.trainer
        if trainer.validating or trainer.sanity_checking:
            return self._val_progress_bar
        if trainer.testing:
            return self._test_progress_bar
        return self._predict_progress_bar if trainer.predicting else self._train_progress_bar

    def _line_if_due(self) -> None:
        now, (then, step) = time.monotonic(), self._last_line
        if not self.is_disabled or now - then < self.seconds_between_lines:
            return
        trainer = self.trainer
        self._last_line = (now, trainer.global_step)
        parts = [self._stage, self._decoding]
        if trainer.state.fn == "fit":
            if done := trainer.global_step - step:
                speeds = f"{done / (now - then):.2f} steps/s", f"{self._tokens_per_second(trainer):.0f} tok/s"
                parts = [_metrics(trainer.progress_bar_metrics), *speeds, *parts]
            total, here = total_steps(trainer), trainer.global_step - self._first_step
            if total and here:
                left = (total - trainer.global_step) * (now - self._since) / here
                parts.append(f"{Tqdm.format_interval(left)} left")
            parts.insert(0, f"step {_step(trainer)}")
        rank_zero_info(" · ".join(part for part in parts if part))

    def _print(self, text: str) -> None:
        if self.is_disabled:
            rank_zero_info(text)
        else:
            self.print(text)


def total_steps(trainer: Trainer) -> int | None:
    """Optimiser steps of the whole run; None if no number of steps or epochs ends it."""
    module: Any = trainer.lightning_module
    if not 0 < trainer.estimated_stepping_batches < math.inf:
        return None
    total = int(module.total_steps())
    return min(total, trainer.max_steps) if trainer.max_steps > 0 else total


def _step(trainer: Trainer) -> str:
    total = total_steps(trainer)
    return f"{trainer.global_step}/{total}" if total else str(trainer.global_step)


def _metrics(metrics: Any) -> str:
    return " · ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
