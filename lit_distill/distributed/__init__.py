"""Distributed training: the strategy ``fsdp2``, and checkpoints that any number of ranks can load."""

from lit_distill.distributed.checkpoint import AtomicCheckpointIO, gathered
from lit_distill.distributed.fsdp2 import FSDP2Strategy
from lit_distill.distributed.gradients import gradient_norm, local_part
from lit_distill.distributed.ranks import SINGLE_PROCESS, DataRanks, data_ranks, without_gradient_sync
from lit_distill.distributed.sharding import (
    Sharding,
    ShardSlice,
    as_shard_of,
    max_over_ranks,
    shard_slice,
    sharding_of,
    slices,
)
from lit_distill.distributed.stored import read_checkpoint

__all__ = [
    "SINGLE_PROCESS",
    "AtomicCheckpointIO",
    "DataRanks",
    "FSDP2Strategy",
    "ShardSlice",
    "Sharding",
    "as_shard_of",
    "data_ranks",
    "gathered",
    "gradient_norm",
    "local_part",
    "max_over_ranks",
    "read_checkpoint",
    "shard_slice",
    "sharding_of",
    "slices",
    "without_gradient_sync",
]
