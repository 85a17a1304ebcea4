"""How models are spread over ranks: what a strategy tells those who load and run them."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Sharding:
    """What is decided about the parameters of student and teacher."""

    mesh: DeviceMesh
    """One-dimensional: the ranks that have different items, over which a block's parameters are cut along their first dimension."""
    compute_dtype: torch.dtype | None
    """Of the student's gathered weights; None for that of the weights."""
    offload_student: bool
    """Keep the student's shards, gradients and optimiser state in host memory, where the optimiser steps."""
    offload_teacher: bool
    """Keep the teacher's shards in host memory."""
    gather_student: bool
    """Gather the whole student once for each decoding batch."""
    gather_teacher: bool
    """Gather the whole teacher once for each decoding batch."""
    tensor_mesh: DeviceMesh | None = None
    """One-dimensional: the ranks that have the same items and each a part of the matrices of a block; None if each runs whole
    blocks."""
    world_mesh: DeviceMesh | None = None
    """One-dimensional: all ranks, where that is more than ``mesh``. Over them all other parameters are cut."""


class DataRanks(NamedTuple):
    """The ranks that share the items of a batch; under tensor parallelism several ranks have the same share."""

    rank: int
    """Which share this rank has."""
    number: int
    """How many shares there are."""
    group: ProcessGroup | None = None
    """One rank for each share, this one among them; None for all ranks."""
    repeats: bool = False
    """Whether an earlier rank has the same share, so that this one need not write down what it finds."""


ALONE = DataRanks(0, 1)


def data_ranks(trainer: Any) -> DataRanks:
    """Which share of every batch this rank has, by its Lightning Trainer."""
    own: DataRanks | None = getattr(trainer.strategy, "data_ranks", None)
    return own or DataRanks(trainer.global_rank, trainer.world_size)


class Box(NamedTuple):
    """A part of a tensor."""

    offset: tuple[int, ...]
    """Where it begins."""
    shape: tuple[int, ...]
    """Of the part."""

    @property
    def num_elements(self) -> int:
        """Of the part, which may be empty."""
        return math.prod(self.shape)


def box_of(tensor: DTensor) -> Box:
    """Which part of a sharded tensor this rank has."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Box(tuple(offset), tuple(shape))


def slices(box: Box) -> tuple[slice, ...]:
    """What to index the whole tensor with."""
    return tuple(slice(start, start + length) for start, length in zip(box.offset, box.shape, strict=True))


def whole_of(tensor: DTensor) -> Tensor:
    """All of a sharded tensor, on all ranks; called by all of them.

    What was cut last is joined first, which is the order of the meshes here; torch's own way warns of two meshes.
    """
    for dimension in range(tensor.device_mesh.ndim):
        placements = [Replicate(), *tensor.placements[dimension + 1 :]]
        tensor = tensor.redistribute(placements=[Replicate()] * dimension + placements)
    return tensor.to_local()


def as_shard_of(tensor: DTensor, local: Tensor, device: torch.device) -> DTensor:
    """A tensor that is spread over the ranks as ``tensor`` is, of which this one has ``local``."""
    shape, stride = tensor.shape, tensor.stride()
    here = local.to(device).contiguous()
    return DTensor.from_local(here, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


def sharding_of(module: Any) -> Sharding | None:
    """What the Trainer of a LightningModule says; None if it shards nothing, or there is no Trainer."""
    trainer = module._trainer
    sharding: Sharding | None = getattr(trainer.strategy, "sharding", None) if trainer else None
    return sharding


def without_gradient_sync(module: Any) -> AbstractContextManager[None]:
    """Keep a rank's gradients to itself until the last micro-batch, where that saves time and costs no memory: not of shards."""
    block = getattr(module.trainer.strategy, "block_backward_sync", nullcontext)
    context: AbstractContextManager[None] = block()
    return context


def most_over_ranks(module: Any, count: int) -> int:
    """The largest ``count`` of all ranks, where each has to run its models as often as the others; else this rank's own."""
    if sharding_of(module) is None:
        return count
    most = torch.tensor(count, device=module.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)
