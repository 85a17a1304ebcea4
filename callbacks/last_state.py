"""Whether a run that an error ends is in a state from which it can go on."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lit_distill.blame import LOST_A_RANK
from lit_distill.guards import DivergedError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
PATIENCE = 5.0
"""Seconds in which all ranks must have come to the same error."""


def can_go_on(trainer: Trainer, error: BaseException, step_before: int) -> bool:
    """Whether the state is worth saving after ``error``; on several ranks all of them must ask.

    It is between two batches, and before the first optimiser step of a batch, which is then learnt from again. Nothing is saved of
    a run that has diverged, to a full disk, or by ranks of which one is missing.

    Args:
        trainer: of the run.
        error: what ended it.
        step_before: the optimiser step at the end of the batch before.
    """
    if not isinstance(error, Exception) or isinstance(error, DivergedError):
        return False
    if (isinstance(error, OSError) and error.errno in FULL) or LOST_A_RANK.search(str(error)):
        return False
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if progress.ready > progress.processed and trainer.global_step > step_before:
        return False
    return trainer.world_size == 1 or _all_ranks_are_here(trainer)


def _all_ranks_are_here(trainer: Trainer) -> bool:
    """Without a collective, for which a rank that has met no error would be missing."""
    store = dist.distributed_c10d._get_default_store()
    key, end = f"lit_distill/error/{trainer.global_step}", time.monotonic() + PATIENCE
    here = store.add(key, 1)
    while here < trainer.world_size and time.monotonic() < end:
        time.sleep(0.1)
        here = store.add(key, 0)
    return bool(here == trainer.world_size)
