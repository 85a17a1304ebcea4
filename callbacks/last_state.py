"""Decides whether the state after an error is worth saving."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lit_distill.distributed.ranks import LOST_A_RANK
from lit_distill.optim import DivergedError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
RANK_TIMEOUT = 5.0
"""Seconds within which all ranks must report the error."""


def can_resume_after(trainer: Trainer, error: BaseException, step_before: int) -> bool:
    """Whether a run can resume from its state after ``error``; with several ranks, all of them must call this.

    It can between two batches, and before the first optimiser step of a batch, which is then repeated. It returns False for a run
    that has diverged, for a full disk, and if a rank is missing.

    Args:
        trainer: the Trainer of the run.
        error: the exception that ended it.
        step_before: the optimiser step at the end of the previous batch.
    """
    if not isinstance(error, Exception) or isinstance(error, DivergedError):
        return False
    if (isinstance(error, OSError) and error.errno in FULL_DISK_ERRORS) or LOST_A_RANK.search(str(error)):
        return False
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if progress.ready > progress.processed and trainer.global_step > step_before:
        return False
    return trainer.world_size == 1 or _all_ranks_have_failed(trainer)


def _all_ranks_have_failed(trainer: Trainer) -> bool:
    """Counts the ranks in the store: a collective would hang if one rank has no error."""
    store = dist.distributed_c10d._get_default_store()
    key, end = f"lit_distill/error/{trainer.global_step}", time.monotonic() + RANK_TIMEOUT
    here = store.add(key, 1)
    while here < trainer.world_size and time.monotonic() < end:
        time.sleep(0.1)
        here = store.add(key, 0)
    return bool(here == trainer.world_size)
