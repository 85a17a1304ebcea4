"""A run that is told to stop saves first, one whose responses collapse says so, and a figure that nobody logs is found at once."""

from __future__ import annotations

import atexit
import os
import re
import signal
import subprocess
import sys
import threading
import time
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
RANK_ZERO = "LIT_DISTILL_RANK_ZERO"
"""Variable of the environment that tells the ranks which rank 0 starts who that is."""


def follow_rank_zero(every: float = 1.0) -> None:
    """End this process, if rank 0 started it, soon after rank 0 has ended in whatever way.

    Lightning looks after the ranks from rank 0 alone. Where that is killed, the others would wait for it as long as
    torch.distributed does, half an hour by default, and hold their devices.

    Args:
        every: seconds between two looks.
    """
    rank_zero = os.environ.get(RANK_ZERO)
    if rank_zero is None or os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[RANK_ZERO] = str(os.getpid())
        return

    def follow() -> None:
        while os.getppid() == int(rank_zero):
            time.sleep(every)
        print(f"Rank {os.environ['LOCAL_RANK']} ends, since rank 0 has.", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)  # it may wait for rank 0 in code that hears nothing else

    threading.Thread(target=follow, name="follow-rank-zero", daemon=True).start()


@cache
def settle_at_exit(seconds: float = 0.2) -> None:
    """Wait a little when the interpreter ends, once it has talked to other ranks.

    A thread of gloo gives back the tensors of the last collective when the ranks have gone on already. If the interpreter is
    ending by then, the thread aborts the process; and Lightning kills rank 0, at its export perhaps, if another rank ended badly.
    """
    atexit.register(time.sleep, seconds)


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
