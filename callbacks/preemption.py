"""Ends a run cleanly after SIGTERM or SIGUSR1, and requeues its SLURM job."""

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


class PreemptionHandler:
    """Ends a run on all ranks after the batch or the validation in which any rank received SIGTERM or SIGUSR1.

    Lightning's own handlers save or communicate with other ranks at any point of a batch, where an exact resume is impossible, and
    the run then continues. These handlers only store the signal. A second signal has its default effect. Under SLURM, SIGUSR1
    (``--signal=USR1@300``) also requeues the job: SLURM itself does so after a preemption or the failure of a node, but not when
    the time limit is reached.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._numbers = SIGNALS
        self._requeue_signal: int | None = None
        self._before: dict[int, Any] = {}

    def install(self, trainer: Trainer) -> None:
        """Install the handlers before Lightning installs its own, and switch off Lightning's requeueing under SLURM.

        Lightning would save ``hpc_ckpt_*.ckpt`` in ``trainer.default_root_dir``, and every other run with the same
        ``trainer.default_root_dir`` would resume from that file.
        """
        environment = trainer._accelerator_connector.cluster_environment  # also set for a strategy on one device
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            environment.auto_requeue = False
            self._requeue_signal = environment.requeue_signal
            self._numbers = tuple(dict.fromkeys((*SIGNALS, self._requeue_signal)))
        self.received = None
        if trainer.state.fn == TrainerFn.FITTING:
            self.register_handlers()

    def register_handlers(self) -> None:
        """Replace the current signal handlers; called again because Lightning installs its own later."""
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                if number != self.received:
                    before = signal.signal(number, self._on_signal)
                    self._before.setdefault(number, before)

    def restore(self, trainer: Trainer) -> None:
        """Restore the handlers from before `install`, now and when Lightning restores its own."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        trainer._signal_connector._original_handlers.update(self._before)
        self._before = {}

    def _on_signal(self, number: int, frame: Any) -> None:
        self.received = self.received or number  # keep the first: SIGTERM may follow SIGUSR1 at the time limit
        signal.signal(number, signal.SIG_DFL)

    def check(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """At the end of a batch or a validation: after a signal on any rank, end the run once a due validation is done."""
        received = self.received or 0
        if trainer.world_size > 1:  # Lightning waits for the other ranks here as well
            flags = torch.tensor([number == received for number in self._numbers], dtype=torch.float32)
            found = trainer.strategy.reduce(flags.to(pl_module.device), reduce_op="sum").nonzero()
            received = self._numbers[int(found[0])] if len(found) else 0
        if received:
            self.received = received
            trainer._signal_connector.received_sigterm = True

    def allow_validation(self, trainer: Trainer) -> None:
        """Before a validation: keep Lightning from ending it early, since a resumed run would count it as complete."""
        trainer._signal_connector.received_sigterm = False

    def requeue(self, trainer: Trainer) -> None:
        """Requeue a SLURM job near its time limit; all ranks wait, since SLURM may kill the others when one ends."""
        if self._requeue_signal is not None and self.received == self._requeue_signal:
            if trainer.is_global_zero:
                self._requeue_job()
            trainer.strategy.barrier("requeue")

    def _requeue_job(self) -> None:
        job, array = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_ARRAY_JOB_ID")
        if array:  # SLURM_JOB_ID may be the id of the whole array
            job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
        if not re.fullmatch(r"\d+(_\d+)?", job):
            rank_zero_warn(f"SLURM: the job was not requeued: {job!r} is not a job id.")
            return
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)  # noqa: S603, S607
            failure = f"status {done.returncode} {done.stderr.strip()}".strip() if done.returncode else ""
        except OSError as error:
            failure = str(error)
        if failure:
            rank_zero_warn(
                f"SLURM: `scontrol requeue {job}` failed ({failure}). Was the job submitted with --requeue? Submit it again; with "
                "--ckpt_path last it resumes from here."
            )
        else:
            rank_zero_info(f"SLURM: job {job} was requeued.")
