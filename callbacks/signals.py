"""A run that is told to stop saves first, and goes back into the queue it came from."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopSignals:
    """Ends a run after the batch or the validation in which SIGTERM or SIGUSR1 came to any rank, on all ranks together.

    Lightning's own handlers save or talk to other ranks in the middle of whatever is going on, from which no run goes on
    exactly, and go on themselves. These only take a note. A second signal does what it would have done without them. Under
    SLURM, SIGUSR1 (``--signal=USR1@300``) also puts the job back into the queue: SLURM does that by itself after a
    pre-emption or the failure of a node, not when the time is up.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._numbers = SIGNALS
        self._requeues_at: int | None = None
        self._before: dict[int, Any] = {}

    def take_over(self, trainer: Trainer) -> None:
        """Before Lightning listens: do in its place what it would do under SLURM.

        Its ``hpc_ckpt_*.ckpt`` in ``trainer.default_root_dir`` is where any other run below that folder would start from.
        """
        environment = trainer._accelerator_connector.cluster_environment  # of a strategy on one device too
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            environment.auto_requeue = False
            self._requeues_at = environment.requeue_signal
            self._numbers = tuple(dict.fromkeys((*SIGNALS, self._requeues_at)))
        self.received = None
        if trainer.state.fn == TrainerFn.FITTING:
            self.listen()

    def listen(self) -> None:
        """Take the place of other handlers, also of those that have come since the last time."""
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                if number != self.received:
                    before = signal.signal(number, self._note)
                    self._before.setdefault(number, before)

    def forget(self, trainer: Trainer) -> None:
        """Give the handlers from before `take_over` their place back, now and when Lightning does."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        trainer._signal_connector._original_handlers.update(self._before)
        self._before = {}

    def _note(self, number: int, frame: Any) -> None:
        self.received = self.received or number  # SIGTERM, when the time is up, makes SIGUSR1 no pre-emption
        signal.signal(number, signal.SIG_DFL)

    def heed(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """At the end of a batch or a validation: let Lightning end the run, after a validation that is due."""
        told = self.received or 0
        if trainer.world_size > 1:  # Lightning waits for the other ranks here as well
            asked = torch.tensor([number == told for number in self._numbers], dtype=torch.float32)
            found = trainer.strategy.reduce(asked.to(pl_module.device), reduce_op="sum").nonzero()
            told = self._numbers[int(found[0])] if len(found) else 0
        if told:
            self.received = told
            trainer._signal_connector.received_sigterm = True

    def let_validate(self, trainer: Trainer) -> None:
        """Before a validation: Lightning would end it after a batch, and the run would go on as if it had been a whole one."""
        trainer._signal_connector.received_sigterm = False

    def requeue(self, trainer: Trainer) -> None:
        """Put a SLURM job whose time is nearly up back into the queue; no rank ends before, at which SLURM may kill the others."""
        if self._requeues_at is not None and self.received == self._requeues_at:
            if trainer.is_global_zero:
                self._ask_slurm()
            trainer.strategy.barrier("requeue")

    def _ask_slurm(self) -> None:
        job, array = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_ARRAY_JOB_ID")
        if array:  # the number of the job may be that of the whole array
            job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
        if not re.fullmatch(r"\d+(_\d+)?", job):
            rank_zero_warn(f"SLURM: the job was not put back into the queue: {job!r} is no number of a job.")
            return
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)  # noqa: S603, S607
            said = f"status {done.returncode} {done.stderr.strip()}".strip() if done.returncode else ""
        except OSError as error:
            said = str(error)
        if said:
            rank_zero_warn(
                f"SLURM: `scontrol requeue {job}` failed ({said}). Was the job submitted with --requeue? Submit it again; with "
                "--ckpt_path last it goes on from here."
            )
        else:
            rank_zero_info(f"SLURM: job {job} is back in the queue.")
