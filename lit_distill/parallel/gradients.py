"""The norm of gradients of which every rank has a part, some parts being on several ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """``[]`` float32: their 2-norm together; if some are sharded, one collective for all of them.

    Args:
        gradients: DTensors on one or several meshes; what is no DTensor is taken to be the same on all ranks.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        by_copies.setdefault(_copies(gradient), []).append(local_part(gradient))
    squares = [torch.nn.utils.get_total_norm(parts).float().square() / copies for copies, parts in by_copies.items()]
    # an offloaded student's are in host memory, an objective's own may not be
    total = torch.stack([square.to(squares[0].device) for square in squares]).sum() if squares else torch.zeros(())
    if any(copies != _world_size() for copies in by_copies):
        torch.distributed.all_reduce(total)
    else:
        total = total * _world_size()
    return total.sqrt()


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _copies(tensor: Tensor) -> int:
    """How many ranks have the part of ``tensor`` that this one has."""
    copies = _world_size()
    if isinstance(tensor, DTensor):
        for dimension, placement in enumerate(tensor.placements):
            if not placement.is_replicate():
                copies //= tensor.device_mesh.size(dimension)
    return copies


class ShardPrecision(Precision):
    """What ``trainer.precision`` means where parameters are shards on several meshes.

    bf16-mixed needs no autocast: shards are float32, and what is gathered from them for a forward pass is bfloat16.

    Args:
        precision: as the Trainer has it.
    """

    def __init__(self, precision: Any) -> None:
        self.precision = precision

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Scale all gradients down to a norm of ``clip_val``; a GPU is not waited for."""
        gradients = [p.grad for p in self.main_params(optimizer) if p.grad is not None]
        if gradients:
            scale = (clip_val / (gradient_norm(gradients) + 1e-6)).clamp(max=1.0)
            for device in {gradient.device for gradient in gradients}:
                here = [local_part(gradient) for gradient in gradients if gradient.device == device]
                torch._foreach_mul_(here, scale.to(device))

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        """Bound every number of the gradients by ``clip_val``."""
        for parameter in self.main_params(optimizer):
            if parameter.grad is not None:
                local_part(parameter.grad).clamp_(-clip_val, clip_val)
