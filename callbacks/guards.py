"""A run that is told to stop saves first, one whose responses collapse says so, and a figure that nobody logs is found at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopSignals:
    """Ends a run after the batch in which SIGTERM or SIGUSR1 came to any rank, on all ranks together.

    Lightning's own handlers save or talk to other ranks in the middle of whatever is going on, from which no run goes on
    exactly. These only take a note. A second signal does what it would have done without them. Under SLURM, SIGUSR1
    (``--signal=USR1@90``) also puts the job back into the queue, as Lightning does.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the place of other handlers."""
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def forget(self) -> None:
        """Give other handlers their place back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def heed(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """At the end of a batch: let Lightning end the run, after a validation that is due, if a rank was told to."""
        told = self.received or 0
        if trainer.world_size > 1:  # Lightning waits for the other ranks here as well
            asked = torch.tensor([number == told for number in SIGNALS], dtype=torch.float32, device=pl_module.device)
            found = trainer.strategy.reduce(asked, reduce_op="sum").nonzero()
            told = SIGNALS[int(found[0])] if len(found) else 0
        if told:
            self.received = told
            trainer._signal_connector.received_sigterm = True

    def requeue(self, trainer: Trainer) -> None:
        """Put a SLURM job whose time is nearly up back into the queue."""
        environment = getattr(trainer.strategy, "cluster_environment", None)
        job = os.environ.get("SLURM_JOB_ID", "")
        requeues = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        if requeues and self.received == signal.SIGUSR1 and trainer.is_global_zero and re.fullmatch(r"[\d_]+", job):
            done = subprocess.run(["scontrol", "requeue", job], check=False)  # noqa: S603, S607 - SLURM's own
            rank_zero_info(f"SLURM: requeue of job {job} ended with status {done.returncode}.")


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
