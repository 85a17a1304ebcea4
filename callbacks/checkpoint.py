"""Checkpoints for runs in which one batch may have many optimiser steps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lit_distill.callbacks.collapse import check_monitor
from lit_distill.callbacks.last_state import can_resume_after
from lit_distill.callbacks.preemption import PreemptionHandler
from lit_distill.distributed import AtomicCheckpointIO
from lit_distill.distributed.watchdog import drain_at_exit
from lit_distill.files import LOCK_FILE, acquire_lock, lock_error, release_lock
from lit_distill.report.metrics import metric_of
from lit_distill.types import arguments_of
from lit_distill.validation import has_validation, logged_metrics

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule


AUTO = "auto"
DEFAULT_MONITOR = "val/loss"


class RunCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint` with all of its arguments, and with some differences.

    ``every_n_train_steps`` saves at the end of the batch in which a multiple of n was passed; Lightning compares the step modulo
    n, which may never fit if a batch has many steps. ``save_last`` is the state at the last validation and at the end of training;
    in Lightning it is the last checkpoint among the best. After SIGTERM or SIGUSR1, the run finishes the batch, and a validation
    that is due, saves its state and ends. While it runs, its folder is locked for other processes.

    ``monitor: auto``, the command line's default, means ``val/loss`` if a validation logs it, otherwise no monitor.
    ``mode: auto``, its default too, keeps the highest value of the project's metrics that should be high (exact match, ROUGE-L,
    pass@k, accuracies, …) and the lowest of any other metric.

    Args:
        reset_optimizer: with ``ckpt_path``, take weights, data position and buffers from the checkpoint, but start a new optimiser
            and learning-rate schedule over the remaining steps: for a ``model.optimizer`` or ``model.lr_scheduler`` of another
            class. It is done once: a checkpoint written after the reset is resumed with its optimiser.
    """

    def __init__(self, *arguments: Any, reset_optimizer: bool = False, **named: Any) -> None:
        self._chooses_mode = named.get("mode") == AUTO
        if self._chooses_mode:
            name = str(named.get("monitor")).partition("/")[2]
            named["mode"] = "max" if metric_of(name).better == "higher" else "min"
        super().__init__(*arguments, **named)
        self._chooses_monitor = self.monitor == AUTO
        self.reset_optimizer = reset_optimizer
        self._signals = PreemptionHandler()
        self._postponed = False
        self._step_before = 0
        self._step_at_start: int | None = None

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Install atomic and sharded checkpoint IO, lock the run's folder, and install the signal handlers."""
        if self._chooses_monitor and stage == "fit":
            self._choose_monitor(trainer, pl_module)
        elif self._chooses_mode and stage == "fit" and self.monitor is not None:
            rank_zero_info(
                f"checkpoint.mode: auto keeps the {'highest' if self.mode == 'max' else 'lowest'} {self.monitor}"
            )
        super().setup(trainer, pl_module, stage)
        if (
            self._manages_run(trainer)
            and not getattr(trainer, "fast_dev_run", False)
            and "://" not in str(self.dirpath)
        ):
            folder = self._folder_of_run()
            if trainer.strategy.broadcast(
                trainer.is_global_zero and not acquire_lock(folder / LOCK_FILE)
            ):  # so that all ranks stop
                raise lock_error(folder, "ckpt_path" if folder != Path(str(self.dirpath)) else "checkpoint.dirpath")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.world_size > 1:
            drain_at_exit()
        if self._is_first(trainer):
            self._signals.install(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: DistillationModule, checkpoint: dict[str, Any]) -> None:
        """Update the saved paths if the folder of checkpoints was moved or copied; paths of missing files stay unchanged."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state and state["dirpath"] != self.dirpath:
            kept = [state["best_model_path"], state["last_model_path"], *state["best_k_models"]]
            here = trainer.strategy.broadcast(self._current_paths(trainer, [state["dirpath"], *kept]))
            for key in ("dirpath", "best_model_path", "last_model_path", "kth_best_model_path"):
                state[key] = here.get(state[key], state[key])
            state["best_k_models"] = {here.get(path, path): score for path, score in state["best_k_models"].items()}

    def on_sanity_check_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Install the signal handlers again, since Lightning installs its own after `setup`."""
        if self._manages_run(trainer):
            self._signals.register_handlers()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Check the name of the monitored metric."""
        with arguments_of(self):
            check_monitor(self.monitor, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Install the signal handlers again, for a run without a sanity check."""
        super().on_train_start(trainer, pl_module)
        self._step_before = self._step_at_start = trainer.global_step
        if self._manages_run(trainer):
            self._signals.register_handlers()

    def teardown(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Restore the signal handlers and release the run's lock."""
        super().teardown(trainer, pl_module, stage)
        self._signals.restore(trainer)
        if self._manages_run(trainer):
            release_lock(self._folder_of_run() / LOCK_FILE)

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; with ``auto`` it does not depend on the chosen metric."""
        if not self._chooses_monitor:
            return super().state_key
        chosen, self.monitor = self.monitor, DEFAULT_MONITOR
        try:
            return super().state_key
        finally:
            self.monitor = chosen

    def _choose_monitor(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        logged = has_validation(trainer) and DEFAULT_MONITOR in logged_metrics(pl_module).names
        self.monitor = DEFAULT_MONITOR if logged else None
        if not logged:
            if self.save_last:
                self.save_top_k = min(self.save_top_k, 0)  # -1 (keep all) is not changed
            rank_zero_info(
                f"checkpoint.monitor: {DEFAULT_MONITOR} is not logged, so there is no best checkpoint; `last` is exported."
            )

    def _current_paths(self, trainer: Trainer, paths: list[str]) -> dict[str, str]:
        """Map a saved folder and its files to their current paths; empty if the run resumes in another folder."""
        folder = Path(str(self.dirpath))
        if trainer.ckpt_path is None or Path(trainer.ckpt_path).parent.resolve() != folder.resolve():
            return {}  # a file of the same name there belongs to another run
        beside = {path: folder / Path(path).name for path in paths[1:] if path}
        found = {path: str(place) for path, place in beside.items() if place.exists()}
        return {paths[0]: str(self.dirpath), **found}

    def _folder_of_run(self) -> Path:
        """The folder with logs and checkpoints; or the folder of checkpoints itself, if the user chose another one."""
        folder = Path(str(self.dirpath))
        return folder.parent if folder.name == "checkpoints" else folder

    def _manages_run(self, trainer: Trainer) -> bool:
        """Whether this callback handles lock, signals and errors: only the first of its class, and only in `fit`."""
        return self._is_first(trainer) and trainer.state.fn == TrainerFn.FITTING

    def _is_first(self, trainer: Trainer) -> bool:
        """Whether this is the first RunCheckpoint of the Trainer."""
        return next((c for c in trainer.checkpoint_callbacks if isinstance(c, RunCheckpoint)), None) is self

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        """Not if ``val_check_interval`` is the int 1 (every batch), which Lightning confuses with 1.0 (every epoch)."""
        every_batch = type(trainer.val_check_interval) is int and trainer.val_check_interval == 1
        if every_batch and self._save_on_train_epoch_end is None and any(trainer.num_val_batches):
            return False
        return super()._should_save_on_train_epoch_end(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DistillationModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a multiple of ``every_n_train_steps`` or ``train_time_interval`` was passed.

        If a validation or the end of an epoch follows, save after that: a run resumed from an earlier state would skip it.
        """
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        more_follows = (
            loop.epoch_loop._should_check_val_fx(loop._data_fetcher) or loop.epoch_loop.batch_progress.is_last_batch
        )
        if self._is_time(trainer):
            self._postponed = more_follows
            if not more_follows:
                self._save_passed(trainer)
        if self._manages_run(trainer):
            self._signals.check(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Let the validation finish even if a signal was received."""
        super().on_validation_start(trainer, pl_module)
        if self._manages_run(trainer):
            self._signals.allow_validation(trainer)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        for logger in trainer.loggers:  # a run that resumes from this checkpoint needs all earlier log entries
            logger.save()
        super()._save_checkpoint(trainer, filepath)

    def on_validation_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Save the best, and always the last; again if this step was saved before its validation."""
        # the metrics of a validation, and the source's reaction to them, are part of the state
        self._last_global_step_saved = -1
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._save_postponed(trainer)
            self._save_stale_last(trainer)
        if self._manages_run(trainer) and not trainer.sanity_checking:
            self._signals.check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """The same, if checkpoints are saved at the end of an epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        self._save_postponed(trainer)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_stale_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Save the last checkpoint, but not after a ``fast_dev_run``, where Lightning would save too."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            super().on_train_end(trainer, pl_module)
            self._save_stale_last(trainer)

    def on_exception(self, trainer: Trainer, pl_module: DistillationModule, exception: BaseException) -> None:
        """Save after a signal, or if the run can resume from its state, and log how to resume."""
        self._save_after_error(trainer, exception)
        if isinstance(exception, SIGTERMException):
            if not self._should_skip_saving_checkpoint(trainer):
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._signals.requeue(trainer)
        self._signals.restore(trainer)
        if self.dirpath is not None and self._manages_run(trainer):
            release_lock(self._folder_of_run() / LOCK_FILE)
        last = self.last_model_path or self.best_model_path  # the path is set before the file is written
        if last and Path(last).exists():
            rank_zero_info(
                f"The last checkpoint is {last}. To resume, run the same command with --ckpt_path last, or with this path."
            )

    def _save_after_error(self, trainer: Trainer, error: BaseException) -> None:
        begun = self._manages_run(trainer) and self._step_at_start is not None
        if not begun or not self.save_last or self._should_skip_saving_checkpoint(trainer):
            return
        if trainer.global_step > (self._step_at_start or 0) and can_resume_after(trainer, error, self._step_before):
            try:
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            except Exception as second:  # noqa: BLE001 - the user must see the first error
                rank_zero_info(f"The state at step {trainer.global_step} could not be saved: {second}")

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        """With the current step: the metric ``step`` is that of the last validation."""
        return {**super()._monitor_candidates(trainer), "step": torch.tensor(trainer.global_step)}

    def _is_time(self, trainer: Trainer) -> bool:
        """By steps, or by rank 0's clock; under manual optimisation Lightning ignores ``train_time_interval``."""
        every, before = self._every_n_train_steps, self._step_before
        self._step_before = trainer.global_step
        if self._train_time_interval is None:
            return every >= 1 and trainer.global_step // every > before // every
        assert self._last_time_checked is not None
        over = time.monotonic() - self._last_time_checked >= self._train_time_interval.total_seconds()
        if over := trainer.strategy.broadcast(over):
            self._last_time_checked = time.monotonic()
        return over

    def _save_passed(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            if self.monitor is None or self.monitor in candidates:
                self._save_topk_checkpoint(trainer, candidates)
            if self.save_last:
                self._save_last_checkpoint(trainer, candidates)

    def _save_postponed(self, trainer: Trainer) -> None:
        if self._postponed:
            self._postponed = False
            self._save_passed(trainer)

    def _save_stale_last(self, trainer: Trainer) -> None:
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
