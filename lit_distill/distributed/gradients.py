"""Norm and clipping of sharded gradients, some of whose parts are replicated on several ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """``[]`` float32: the 2-norm of all gradients together; one collective if some are sharded.

    Args:
        gradients: DTensors on one or several meshes; plain tensors are assumed to be equal on all ranks.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        by_copies.setdefault(_copies(gradient), []).append(local_part(gradient))
    squares = [torch.nn.utils.get_total_norm(parts).float().square() / copies for copies, parts in by_copies.items()]
    # gradients of an offloaded student are on the CPU, those of an objective's own parameters may be on the GPU
    total = torch.stack([square.to(squares[0].device) for square in squares]).sum() if squares else torch.zeros(())
    if any(copies != _world_size() for copies in by_copies):
        torch.distributed.all_reduce(total)
    else:
        total = total * _world_size()
    return total.sqrt()


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _copies(tensor: Tensor) -> int:
    """The number of ranks that have the same part of ``tensor`` as this rank."""
    copies = _world_size()
    if isinstance(tensor, DTensor):
        for dimension, placement in enumerate(tensor.placements):
            if not placement.is_replicate():
                copies //= tensor.device_mesh.size(dimension)
    return copies


class ShardPrecision(Precision):
    """Implements ``trainer.precision`` and gradient clipping for parameters that are sharded on several meshes.

    bf16-mixed needs no autocast: shards are float32, and the weights gathered for a forward pass are bfloat16.

    Args:
        precision: value of ``trainer.precision``.
    """

    def __init__(self, precision: Any) -> None:
        self.precision = precision

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Scale all gradients down to a norm of at most ``clip_val``, without waiting for the GPU."""
        gradients = [p.grad for p in self.main_params(optimizer) if p.grad is not None]
        if gradients:
            scale = (clip_val / (gradient_norm(gradients) + 1e-6)).clamp(max=1.0)
            for device in {gradient.device for gradient in gradients}:
                here = [local_part(gradient) for gradient in gradients if gradient.device == device]
                torch._foreach_mul_(here, scale.to(device))

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip every element of the gradients to [-clip_val, clip_val]."""
        for parameter in self.main_params(optimizer):
            if parameter.grad is not None:
                local_part(parameter.grad).clamp_(-clip_val, clip_val)
