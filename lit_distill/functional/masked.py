"""Values on the tokens of padded responses: read inside the mask alone."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(values: Tensor) -> Tensor:
    """float32, or float64 if that is what came in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def keep(values: Tensor, kept: Tensor) -> Tensor:
    """The values inside the mask and 0 outside, even for NaN outside."""
    return torch.where(kept, widen(values), 0.0)


def check_shapes(**tensors: Tensor) -> None:
    """Refuses tensors that do not line up, by name.

    Raises:
        ValueError: if the shapes differ.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"Expected tensors of one shape, one number per response token, got {shapes}.")
