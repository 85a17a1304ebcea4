"""Models spread over ranks: the strategy ``fsdp2``, and checkpoints that any number of ranks can read."""

from lit_distill.parallel.gradients import gradient_norm, local_part
from lit_distill.parallel.reading import read_checkpoint
from lit_distill.parallel.sharding import (
    ALONE,
    Box,
    DataRanks,
    Sharding,
    as_shard_of,
    box_of,
    data_ranks,
    most_over_ranks,
    sharding_of,
    slices,
    without_gradient_sync,
)
from lit_distill.parallel.storage import AtomicCheckpointIO, gathered
from lit_distill.parallel.strategy import FSDP2Strategy

__all__ = [
    "ALONE",
    "AtomicCheckpointIO",
    "Box",
    "DataRanks",
    "FSDP2Strategy",
    "Sharding",
    "as_shard_of",
    "box_of",
    "data_ranks",
    "gathered",
    "gradient_norm",
    "local_part",
    "most_over_ranks",
    "read_checkpoint",
    "sharding_of",
    "slices",
    "without_gradient_sync",
]
