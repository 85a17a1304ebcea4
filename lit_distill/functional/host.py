"""What the host knows about tensors on a device, so that it need not wait for the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` of the CPU on ``device``. The copy to a GPU waits for nothing, since it starts in page-locked memory."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@dataclass(frozen=True)
class HostMasks:
    """Copies of two masks in the memory of the host.

    They hold only as long as they describe the tensors: a mask that was replaced or changed in place is read from the device again.
    """

    attended: Tensor
    """[B, S] bool on the CPU: the tokens of the texts."""
    targets: Tensor
    """[B, S] bool on the CPU: the tokens that the loss is computed on."""
    tensors: tuple[Tensor, Tensor]
    """The masks that were copied."""
    versions: tuple[int | None, int | None]
    """How often these had been changed in place."""
    tokens: Tensor | None = None
    """[B, S] int64 on the CPU: the token ids, if they were there before they went to a device."""

    @classmethod
    def read(cls, attention_mask: Tensor, target_mask: Tensor) -> HostMasks:
        """Copy masks ``[B, S]`` with one wait for their device."""
        attended, targets = torch.stack([attention_mask.bool(), target_mask]).cpu()
        return cls.known(attended, targets, attention_mask, target_mask)

    @classmethod
    def known(
        cls,
        attended: Tensor,
        targets: Tensor,
        attention_mask: Tensor,
        target_mask: Tensor,
        tokens: Tensor | None = None,
    ) -> HostMasks:
        """The masks of tensors whose values are known."""
        versions = _version(attention_mask), _version(target_mask)
        return cls(attended, targets, (attention_mask, target_mask), versions, tokens)

    def describe(self, attention_mask: Tensor, target_mask: Tensor) -> bool:
        """Whether these are the masks of both tensors as they are now."""
        tensors = attention_mask, target_mask
        return all(a is b for a, b in zip(self.tensors, tensors, strict=True)) and self.versions == tuple(
            map(_version, tensors)
        )

    @cached_property
    def target_index(self) -> Tensor:
        """[N] int64 on the device of the masks: index of every target in the flattened ``[B · S]`` tokens.

        Raises:
            ValueError: if a token of column 0 is a target.
        """
        if self.targets[:, 0].any():
            raise ValueError(
                "target_mask: the first token of a text is a target, but no token predicts it. Set column 0 to False."
            )
        return to_device(self.targets.flatten().nonzero()[:, 0], self.tensors[1].device)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
