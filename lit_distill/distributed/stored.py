"""Reads checkpoints, as files or folders, piece by piece: only the parts that this rank needs, or everything."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_distill.distributed.sharding import ShardSlice, as_shard_of, shard_slice, slices

META = "meta.pt"
"""File with the unsharded part of a checkpoint folder; Lightning also recognises a sharded checkpoint by this name."""
GENERATION = "generation"
RANKS = "ranks"
"""Key in `META`: the number of ranks that wrote the checkpoint, with one file each."""
KeyPath = tuple[str | int, ...]
"""The keys from the root of a checkpoint to one of its tensors."""


def rank_files(folder: Path, meta: Mapping[str, Any]) -> list[Path]:
    """The files of a checkpoint's shards.

    Args:
        folder: folder of the checkpoint.
        meta: content of its ``meta.pt``.

    Raises:
        ValueError: if files are missing.
    """
    found = sorted(folder.glob(f"{meta.get(GENERATION)}-rank-*.safetensors"))
    wanted = meta.get(RANKS, len(found))
    if len(found) != wanted:
        raise ValueError(
            f"{folder} is incomplete: {wanted} ranks wrote it, but only {len(found)} of their files exist. Give another "
            "checkpoint, or restore the missing files. With several nodes, it must be in a folder that all of them can read."
        )
    return found


class StoredCheckpoint:
    """A checkpoint that is read piece by piece.

    Args:
        path: file or folder.
        stack: exit stack that closes the files.

    Raises:
        ValueError: if it is not a complete checkpoint.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        folder = path.is_dir()
        try:
            self.rest: dict[str, Any] = torch.load(
                path / META if folder else path, map_location="cpu", weights_only=True, mmap=True
            )
        except (
            RuntimeError,
            OSError,
            EOFError,
            UnpicklingError,
        ) as error:  # not a zip file, truncated, or contains other objects
            raise ValueError(
                f"{path} cannot be read as a checkpoint of plain tensors: {str(error).splitlines()[0]}"
            ) from error
        if not isinstance(self.rest, dict):
            raise ValueError(f"{path} is not a checkpoint: it contains a {type(self.rest).__name__}.")
        self._pieces: dict[KeyPath, list[tuple[Any, str, ShardSlice]]] = {}
        self._shapes: dict[KeyPath, tuple[int, ...]] = {}
        for file in rank_files(path, self.rest) if folder else []:
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} cannot be read: {error}. Give another checkpoint, or copy this one again."
                ) from error
            for entry in json.loads(opened.metadata()["index"]):
                place, offset = tuple(entry["place"]), tuple(entry["offset"])
                shape = tuple(opened.get_slice(entry["piece"]).get_shape())
                self._pieces.setdefault(place, []).append((opened, entry["piece"], ShardSlice(offset, shape)))
                self._shapes[place] = tuple(entry["shape"])
        for place, pieces in self._pieces.items():
            if sum(piece.num_elements for _, _, piece in pieces) != math.prod(self._shapes[place]):
                name = ".".join(map(str, place))
                raise ValueError(f"{path} is incomplete: parts of {name} are missing. Give another checkpoint.")

    def places(self) -> list[KeyPath]:
        """Key paths of the sharded tensors; empty for a file."""
        return list(self._pieces)

    def read(self, place: KeyPath, box: ShardSlice | None = None) -> Tensor:
        """Read a tensor, or only its part ``box``."""
        if place not in self._pieces:
            value: Any = self.rest
            for key in place:
                value = value[key]
            return value[slices(box)].clone() if box is not None else value
        box = box or ShardSlice((0,) * len(self._shapes[place]), self._shapes[place])
        result: Tensor | None = None
        for opened, name, piece in self._pieces[place]:
            first = [max(a, b) for a, b in zip(box.offset, piece.offset, strict=True)]
            ends = zip(box.offset, box.shape, piece.offset, piece.shape, strict=True)
            last = [min(a + n, b + m) for a, n, b, m in ends]
            if any(a >= b for a, b in zip(first, last, strict=True)):
                continue
            inside = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, piece.offset, strict=True))
            values = opened.get_slice(name)[inside]
            result = values.new_empty(box.shape) if result is None else result
            result[tuple(slice(a - o, b - o) for a, b, o in zip(first, last, box.offset, strict=True))] = values
        return torch.empty(box.shape) if result is None else result

    def shape(self, place: KeyPath) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._shapes[place] if place in self._shapes else tuple(self.read(place).shape)

    def optimizer_state(self, index: int, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """State ``index`` for `Optimizer.load_state_dict`; tensors with the shape of their parameter are sharded like it."""
        stored = self.rest["optimizer_states"][index]
        state = {
            number: {
                name: self._part(("optimizer_states", index, "state", number, name), value, parameters[number])
                for name, value in values.items()
            }
            for number, values in stored["state"].items()
        }
        return {**stored, "state": state}

    def _part(self, place: KeyPath, value: Any, parameter: Tensor) -> Any:
        if place not in self._pieces and not isinstance(value, Tensor):
            return value
        if not isinstance(parameter, DTensor) or self.shape(place) != tuple(parameter.shape):
            return self.read(place)
        return as_shard_of(parameter, self.read(place, shard_slice(parameter)), parameter.to_local().device)


@contextmanager
def open_checkpoint(path: Path) -> Iterator[StoredCheckpoint]:
    """Open a checkpoint, file or folder; its files are closed at the end of the context."""
    with ExitStack() as stack:
        yield StoredCheckpoint(path, stack)


def read_checkpoint(path: Path, parts: Sequence[str] | None = None) -> dict[str, Any]:
    """Read a checkpoint, file or folder, with full tensors in CPU memory.

    Args:
        path: path of the file or folder.
        parts: top-level keys whose sharded tensors are read; by default all.

    Raises:
        ValueError: if it cannot be read.
    """
    with open_checkpoint(path) as stored:
        for place in stored.places():
            if parts is None or place[0] in parts:
                owner: Any = stored.rest
                for key in place[:-1]:
                    owner = owner[key]
                owner[place[-1]] = stored.read(place)
        return stored.rest


def without_tensors(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint with its tensors on the meta device, i.e. without their values."""
    state = checkpoint / META if checkpoint.is_dir() else checkpoint
    meta: dict[str, Any] = torch.load(state, map_location="meta", weights_only=True, mmap=True)
    return meta


def refuse_another_model(there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the weights of a checkpoint have the names and shapes of the model that will load them.

    Raises:
        ValueError: if they differ; names ``ckpt_path`` and the first weight that differs.
    """
    different = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"ckpt_path: the checkpoint is of another model: {name} is {there.get(name, 'missing')} in the checkpoint, but "
            f"{here.get(name, 'missing')} in model.student ({len(different)} weights differ). Give a checkpoint of this "
            "student, or set model.student to the checkpoint's."
        )


def load_into(stored: StoredCheckpoint, state: Mapping[str, Tensor], strict: bool) -> None:
    """Read this rank's part of every tensor of a module's state, in place.

    Raises:
        ValueError: if names or shapes differ.
    """
    there = stored.rest["state_dict"].keys()
    sizes = {name: stored.shape(("state_dict", name)) for name in there}
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if not strict:
        sizes, wanted = ({name: own[name] for name in wanted.keys() & there} for own in (sizes, wanted))
    refuse_another_model(sizes, wanted)
    with torch.no_grad():
        for name in sizes:
            place, target = ("state_dict", name), state[name]
            if isinstance(target, DTensor):
                target.to_local().copy_(stored.read(place, shard_slice(target)))
            else:
                target.copy_(stored.read(place))
