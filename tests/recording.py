"""Records work on a processor as a CUDA graph does on a GPU, to test what must hold for a graph where there is none.

The recorded operations are done again on the same tensors, so a number that the host has put in (a step, a length) stays as it was.
As in a capture, nothing happens while recording, no value may be read, and every tensor from outside must be one that stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")


class Recording(TorchDispatchMode):
    """A `lit_distill.models.replay.Capture`.

    Args:
        lasting: returns the tensors that stay where they are, at the time of a recording.
    """

    def __init__(self, lasting: Callable[[], Iterable[Tensor]]) -> None:
        super().__init__()
        self.lasting = lasting
        self.captures = 0
        self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.known = {tensor.untyped_storage().data_ptr() for tensor in self.lasting()}
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self.changed: dict[int, tuple[Any, Any]] = {}
        with self:
            work()
        for storage, before in self.changed.values():
            storage.copy_(before)
        self.captures += 1
        calls = self.calls

        def replay() -> None:
            self.replays += 1
            for operation, arguments, named, outputs in calls:
                for old, new in zip(outputs, tensors(operation(*arguments, **named)), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        name = operation.overloadpacket.__name__
        if name in READS:
            raise RuntimeError(f"{name} reads a value of the device")
        given = tensors((arguments, named))
        # what requires a gradient is a weight, or autocast's copy of one, which it keeps until the generation ends
        outside = [tensor for tensor in given if not tensor.requires_grad]
        if name == "lift_fresh":  # a number in Python becomes a tensor; a kernel takes one of no dimension by value
            outside = [tensor for tensor in outside if tensor.dim()]
        strangers = [tensor for tensor in outside if tensor.untyped_storage().data_ptr() not in self.known]
        if strangers:
            raise RuntimeError(f"{name} uses a tensor of {tuple(strangers[0].shape)} from outside that does not stay")
        if operation._schema.is_mutable:
            for tensor in given:
                storage = tensor.untyped_storage()
                self.changed.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = operation(*arguments, **named)
        outputs = tensors(result)
        self.known.update(tensor.untyped_storage().data_ptr() for tensor in outputs)
        self.calls.append((operation, arguments, named, outputs))
        return result


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
