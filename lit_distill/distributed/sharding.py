"""How models are sharded over ranks: the settings of a strategy, and functions on shards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Sharding:
    """Settings for sharding student and teacher."""

    mesh: DeviceMesh
    """One-dimensional, over the data-parallel ranks: the parameters of blocks are sharded over it along their first dimension."""
    compute_dtype: torch.dtype | None
    """Dtype of the student's gathered weights; None keeps the dtype of the shards."""
    offload_student: bool
    """Keep the student's shards, gradients and optimiser state in CPU memory; the optimiser step runs on the CPU."""
    offload_teacher: bool
    """Keep the teacher's shards in CPU memory."""
    gather_student: bool
    """Gather the whole student once for each batch that is generated."""
    gather_teacher: bool
    """Gather the whole teacher once for each batch that is generated."""
    tensor_mesh: DeviceMesh | None = None
    """One-dimensional, over the tensor-parallel ranks, which process the same examples and split the matrices of each block; None
    without tensor parallelism."""
    world_mesh: DeviceMesh | None = None
    """One-dimensional, over all ranks: parameters outside the blocks are sharded over it. None if ``mesh`` has all ranks."""


class ShardSlice(NamedTuple):
    """Offset and shape of a part of a tensor."""

    offset: tuple[int, ...]
    """Index of its first element."""
    shape: tuple[int, ...]
    """Shape of the part."""

    @property
    def num_elements(self) -> int:
        """Number of elements in the part; 0 if it is empty."""
        return math.prod(self.shape)


def shard_slice(tensor: DTensor) -> ShardSlice:
    """The part of a sharded tensor that this rank stores."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return ShardSlice(tuple(offset), tuple(shape))


def slices(box: ShardSlice) -> tuple[slice, ...]:
    """The index of the part in the full tensor."""
    return tuple(slice(start, start + length) for start, length in zip(box.offset, box.shape, strict=True))


def full_tensor(tensor: DTensor) -> Tensor:
    """Gather a sharded tensor on all ranks; a collective.

    Mesh dimensions are gathered one by one from the first, which was sharded last. `DTensor.full_tensor` would warn about tensors
    on two-dimensional meshes.
    """
    for dimension in range(tensor.device_mesh.ndim):
        placements = [Replicate(), *tensor.placements[dimension + 1 :]]
        tensor = tensor.redistribute(placements=[Replicate()] * dimension + placements)
    return tensor.to_local()


def as_shard_of(tensor: DTensor, local: Tensor, device: torch.device) -> DTensor:
    """A DTensor with the mesh, placements and shape of ``tensor``, of which this rank stores ``local``."""
    shape, stride = tensor.shape, tensor.stride()
    here = local.to(device).contiguous()
    return DTensor.from_local(here, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


def sharding_of(module: Any) -> Sharding | None:
    """The sharding of a LightningModule's strategy; None if it does not shard or the module has no Trainer."""
    trainer = module._trainer
    sharding: Sharding | None = getattr(trainer.strategy, "sharding", None) if trainer else None
    return sharding


def max_over_ranks(module: Any, count: int) -> int:
    """The largest ``count`` over ranks if models are sharded, as all ranks must then run them equally often; else ``count``."""
    if sharding_of(module) is None:
        return count
    most = torch.tensor(count, device=module.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)
