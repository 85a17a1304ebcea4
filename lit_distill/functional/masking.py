"""Helpers for values on the tokens of padded responses; only values inside the mask are used."""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(values: Tensor) -> Tensor:
    """Convert to float32; float64 stays float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def masked_fill_outside(values: Tensor, kept: Tensor) -> Tensor:
    """The values inside the mask ``kept`` and 0 outside, even where a value outside is NaN."""
    return torch.where(kept, upcast(values), 0.0)


def check_shapes(**tensors: Tensor) -> None:
    """Reject tensors of different shapes.

    Raises:
        ValueError: if the shapes differ.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"Expected tensors of one shape, one number per response token, got {shapes}.")
