"""Splits batches over ranks, and recognises errors caused by the loss of another rank."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch.distributed import ProcessGroup

LOST_A_RANK = re.compile("closed by peer|reset by peer|Broken pipe|Timed out waiting|ncclRemoteError|NCCL.*timeout")
"""Matches error messages of gloo and NCCL after another rank has ended."""


class DataRanks(NamedTuple):
    """This rank's share of every batch. With tensor parallelism, several ranks have the same share."""

    rank: int
    """Index of this rank's share."""
    number: int
    """Number of shares."""
    group: ProcessGroup | None = None
    """Group with one rank for each share, including this rank; None for all ranks."""
    is_replica: bool = False
    """Whether a lower rank has the same share, so that this rank must not record its results again."""


SINGLE_PROCESS = DataRanks(0, 1)


def data_ranks(trainer: Any) -> DataRanks:
    """This rank's share of every batch, from its Lightning Trainer."""
    own: DataRanks | None = getattr(trainer.strategy, "data_ranks", None)
    return own or DataRanks(trainer.global_rank, trainer.world_size)


def without_gradient_sync(module: Any) -> AbstractContextManager[None]:
    """Skip the gradient all-reduce until the last micro-batch, if the strategy can (DDP); sharded gradients are always reduced."""
    block = getattr(module.trainer.strategy, "block_backward_sync", nullcontext)
    context: AbstractContextManager[None] = block()
    return context
