"""Checkpoints of runs in which one batch may be many optimiser steps."""

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
from lit_distill.callbacks.guards import check_monitor
from lit_distill.callbacks.last_state import can_go_on
from lit_distill.callbacks.signals import StopSignals
from torch import Tensor

from lit_distill.checks import has_validation, logged_metrics
from lit_distill.occupied import leave, occupies, refusal
from lit_distill.parallel import AtomicCheckpointIO
from lit_distill.parallel.processes import settle_at_exit

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule


AUTO = "auto"
DEFAULT_MONITOR = "val/loss"


class RunCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, with all of its arguments, and two promises kept.

    ``every_n_train_steps`` saves at the end of the batch in which a multiple of n was passed; Lightning's compares the step
    modulo n, which a batch of many steps may miss for ever. ``save_last`` is the state at the last validation and at the end of
    training; Lightning's is that of the last checkpoint among the best. SIGTERM and SIGUSR1 end the run after the batch, and a
    validation that is due, with the state at that time saved. No second process trains in the same folder meanwhile.

    ``monitor: auto``, the command line's default, is ``val/loss`` where a validation logs it, and else nothing.

    Args:
        reset_optimizer: with ``ckpt_path``, take weights, data position and buffers from the checkpoint, and start optimiser and
            learning-rate schedule afresh, over the steps that are left: for a ``model.optimizer`` or ``model.lr_scheduler`` of
            another class. Once: a checkpoint of a run that has done so is gone on from as it is.
    """

    def __init__(self, *arguments: Any, reset_optimizer: bool = False, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._chooses_monitor = self.monitor == AUTO
        self.reset_optimizer = reset_optimizer
        self._signals = StopSignals()
        self._postponed = False
        self._step_before = 0
        self._step_at_start: int | None = None

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Let checkpoints be written whole or not at all, and read from folders of shards too; take their folder."""
        if self._chooses_monitor and stage == "fit":
            self._choose_monitor(trainer, pl_module)
        super().setup(trainer, pl_module, stage)
        if self._listens(trainer) and not getattr(trainer, "fast_dev_run", False) and "://" not in str(self.dirpath):
            folder = self._folder_of_run()
            if trainer.strategy.broadcast(trainer.is_global_zero and not occupies(folder)):  # so that all ranks stop
                raise refusal(folder, "ckpt_path" if folder != Path(str(self.dirpath)) else "checkpoint.dirpath")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.world_size > 1:
            settle_at_exit()
        if self._is_first(trainer):
            self._signals.take_over(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: DistillationModule, checkpoint: dict[str, Any]) -> None:
        """Let the paths of checkpoints follow their folder, if it was moved or copied; what is not in it stays as it is."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state and state["dirpath"] != self.dirpath:
            kept = [state["best_model_path"], state["last_model_path"], *state["best_k_models"]]
            here = trainer.strategy.broadcast(self._found_here(trainer, [state["dirpath"], *kept]))
            for key in ("dirpath", "best_model_path", "last_model_path", "kth_best_model_path"):
                state[key] = here.get(state[key], state[key])
            state["best_k_models"] = {here.get(path, path): score for path, score in state["best_k_models"].items()}

    def on_sanity_check_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Listen to signals in the place of Lightning, which has begun to since `setup`."""
        if self._listens(trainer):
            self._signals.listen()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Look for the figure to monitor."""
        check_monitor(self.monitor, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """The same, where there was no such check."""
        super().on_train_start(trainer, pl_module)
        self._step_before = self._step_at_start = trainer.global_step
        if self._listens(trainer):
            self._signals.listen()

    def teardown(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Listen no more, and let others into the folder."""
        super().teardown(trainer, pl_module, stage)
        self._signals.forget(trainer)
        if self._listens(trainer):
            leave(self._folder_of_run())

    @property
    def state_key(self) -> str:
        """Under which name the state lies in a checkpoint: the same whatever ``auto`` has come to."""
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
                self.save_top_k = min(self.save_top_k, 0)  # -1, which keeps all, stays
            rank_zero_info(
                f"checkpoint.monitor: nothing logs {DEFAULT_MONITOR}, so there is no best state; `last` is saved and exported."
            )

    def _found_here(self, trainer: Trainer, paths: list[str]) -> dict[str, str]:
        """Of a folder and the files in it, where each is today: nothing, if the run goes on elsewhere than its checkpoint lies."""
        folder = Path(str(self.dirpath))
        if trainer.ckpt_path is None or Path(trainer.ckpt_path).parent.resolve() != folder.resolve():
            return {}  # a file of the same name is then another run's
        beside = {path: folder / Path(path).name for path in paths[1:] if path}
        found = {path: str(place) for path, place in beside.items() if place.exists()}
        return {paths[0]: str(self.dirpath), **found}

    def _folder_of_run(self) -> Path:
        """Where logs lie beside the folder of checkpoints; or that folder, if it was named by the user."""
        folder = Path(str(self.dirpath))
        return folder.parent if folder.name == "checkpoints" else folder

    def _listens(self, trainer: Trainer) -> bool:
        """One callback is enough for all, and only a run that trains has something to save."""
        return self._is_first(trainer) and trainer.state.fn == TrainerFn.FITTING

    def _is_first(self, trainer: Trainer) -> bool:
        """Of its class, whatever other callbacks save as well."""
        return next((c for c in trainer.checkpoint_callbacks if isinstance(c, RunCheckpoint)), None) is self

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        """Not where validation comes after every batch, whose ``val_check_interval: 1`` Lightning takes for that of an epoch."""
        every_batch = type(trainer.val_check_interval) is int and trainer.val_check_interval == 1
        if every_batch and self._save_on_train_epoch_end is None and any(trainer.num_val_batches):
            return False
        return super()._should_save_on_train_epoch_end(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DistillationModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a multiple of ``every_n_train_steps`` was passed, or the time has come; after what is due at this batch.

        From a state before a validation, or before the end of an epoch, a run would go on without it.
        """
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        more = loop.epoch_loop._should_check_val_fx(loop._data_fetcher) or loop.epoch_loop.batch_progress.is_last_batch
        if self._is_time(trainer):
            self._postponed = more
            if not more:
                self._save_passed(trainer)
        if self._listens(trainer):
            self._signals.heed(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Let it come to its end, whatever was heard."""
        super().on_validation_start(trainer, pl_module)
        if self._listens(trainer):
            self._signals.let_validate(trainer)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        for logger in trainer.loggers:  # a run that goes on from here expects what was logged until here
            logger.save()
        super()._save_checkpoint(trainer, filepath)

    def on_validation_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Save the best, and the last whether it is among them or not; again, if this step was saved before its validation."""
        # what a validation says, and what the source makes of it, is part of the state
        self._last_global_step_saved = -1
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._save_postponed(trainer)
            self._save_stale_last(trainer)
        if self._listens(trainer) and not trainer.sanity_checking:
            self._signals.heed(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """The same, where checkpoints are saved at the end of an epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        self._save_postponed(trainer)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_stale_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Save the last; Lightning would do so after a ``fast_dev_run`` too."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            super().on_train_end(trainer, pl_module)
            self._save_stale_last(trainer)

    def on_exception(self, trainer: Trainer, pl_module: DistillationModule, exception: BaseException) -> None:
        """Save, if it was a signal or there is a state to go on from, and say how to go on."""
        self._save_after_error(trainer, exception)
        if isinstance(exception, SIGTERMException):
            if not self._should_skip_saving_checkpoint(trainer):
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._signals.requeue(trainer)
        self._signals.forget(trainer)
        if self.dirpath is not None and self._listens(trainer):
            leave(self._folder_of_run())
        if last := self.last_model_path or self.best_model_path:
            rank_zero_info(
                f"The last checkpoint is {last}. To go on, give the same command with --ckpt_path last, or with this path."
            )

    def _save_after_error(self, trainer: Trainer, error: BaseException) -> None:
        begun = self._listens(trainer) and self._step_at_start is not None
        if not begun or not self.save_last or self._should_skip_saving_checkpoint(trainer):
            return
        if trainer.global_step > (self._step_at_start or 0) and can_go_on(trainer, error, self._step_before):
            try:
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            except Exception as second:  # noqa: BLE001 - the first one is what the user must see
                rank_zero_info(f"The state at step {trainer.global_step} could not be saved: {second}")

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        """With the step of now: that among the figures, which says where they stand in the logs, is of the last validation."""
        return {**super()._monitor_candidates(trainer), "step": torch.tensor(trainer.global_step)}

    def _is_time(self, trainer: Trainer) -> bool:
        """By steps, or by the clock of rank 0, at which Lightning does not look under manual optimisation."""
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
