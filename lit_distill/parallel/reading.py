"""Checkpoints that are read piece by piece, whoever wrote them: what this rank needs of them, or all."""

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

from lit_distill.parallel.sharding import Box, as_shard_of, box_of, slices

META = "meta.pt"
"""The part of a checkpoint in a folder that is no shard; also Lightning's sign of one."""
GENERATION = "generation"
RANKS = "ranks"
"""How many ranks have written a checkpoint, each a file."""
Place = tuple[str | int, ...]
"""Keys that lead from a checkpoint to one of its tensors."""


def rank_files(folder: Path, said: Mapping[str, Any]) -> list[Path]:
    """The files of a checkpoint's shards.

    Args:
        folder: of the checkpoint.
        said: what its ``meta.pt`` says.

    Raises:
        ValueError: if some are not there.
    """
    found = sorted(folder.glob(f"{said.get(GENERATION)}-rank-*.safetensors"))
    wanted = said.get(RANKS, len(found))
    if len(found) != wanted:
        raise ValueError(
            f"{folder} is incomplete: {wanted} ranks have written it, and there are the files of {len(found)}. Give another "
            "checkpoint, or bring back the rest of this one: on several nodes it has to lie where all of them see it."
        )
    return found


class StoredCheckpoint:
    """A checkpoint that is read piece by piece.

    Args:
        path: file or folder.
        stack: closes the files.

    Raises:
        ValueError: if it is none.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        folder = path.is_dir()
        try:
            self.rest: dict[str, Any] = torch.load(
                path / META if folder else path, map_location="cpu", weights_only=True, mmap=True
            )
        except (RuntimeError, OSError, EOFError, UnpicklingError) as error:  # no zip, cut off, or more than tensors
            raise ValueError(
                f"{path} cannot be read as a checkpoint of plain tensors: {str(error).splitlines()[0]}"
            ) from error
        if not isinstance(self.rest, dict):
            raise ValueError(f"{path} is not a checkpoint: it holds a {type(self.rest).__name__}.")
        self._pieces: dict[Place, list[tuple[Any, str, Box]]] = {}
        self._shapes: dict[Place, tuple[int, ...]] = {}
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
                self._pieces.setdefault(place, []).append((opened, entry["piece"], Box(offset, shape)))
                self._shapes[place] = tuple(entry["shape"])
        for place, pieces in self._pieces.items():
            if sum(piece.num_elements for _, _, piece in pieces) != math.prod(self._shapes[place]):
                raise ValueError(f"{path} is incomplete: it has not all of {'.'.join(map(str, place))}.")

    def places(self) -> list[Place]:
        """Of the sharded tensors; there are none in a file."""
        return list(self._pieces)

    def read(self, place: Place, box: Box | None = None) -> Tensor:
        """A tensor, or the part of it that ``box`` says."""
        if place not in self._pieces:
            value: Any = self.rest
            for key in place:
                value = value[key]
            return value[slices(box)].clone() if box is not None else value
        box = box or Box((0,) * len(self._shapes[place]), self._shapes[place])
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

    def shape(self, place: Place) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._shapes[place] if place in self._shapes else tuple(self.read(place).shape)

    def optimizer_state(self, index: int, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """State ``index`` as `Optimizer.load_state_dict` wants it, with this rank's part of what is as large as its parameter."""
        stored = self.rest["optimizer_states"][index]
        state = {
            number: {
                name: self._part(("optimizer_states", index, "state", number, name), value, parameters[number])
                for name, value in values.items()
            }
            for number, values in stored["state"].items()
        }
        return {**stored, "state": state}

    def _part(self, place: Place, value: Any, parameter: Tensor) -> Any:
        if place not in self._pieces and not isinstance(value, Tensor):
            return value
        if not isinstance(parameter, DTensor) or self.shape(place) != tuple(parameter.shape):
            return self.read(place)
        return as_shard_of(parameter, self.read(place, box_of(parameter)), parameter.to_local().device)


@contextmanager
def open_checkpoint(path: Path) -> Iterator[StoredCheckpoint]:
    """Open a checkpoint, file or folder, for as long as it is read."""
    with ExitStack() as stack:
        yield StoredCheckpoint(path, stack)


def read_checkpoint(path: Path, parts: Sequence[str] | None = None) -> dict[str, Any]:
    """A checkpoint, file or folder, with all of its tensors whole and in host memory.

    Args:
        path: of the file or folder.
        parts: of the sharded tensors, read only those under these keys; by default all.

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


def refuse_another_model(there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the shapes of a checkpoint's weights with those of the model that is to have them.

    Raises:
        ValueError: naming ``ckpt_path`` and the first weight that differs.
    """
    different = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"ckpt_path: the checkpoint is of another model: {name} is {there.get(name, 'not there')} in it, and "
            f"{here.get(name, 'not there')} in model.student ({len(different)} weights differ). Give a checkpoint of this "
            "student, or set model.student to the checkpoint's."
        )


def load_into(stored: StoredCheckpoint, state: Mapping[str, Tensor], strict: bool) -> None:
    """Read this rank's part of every tensor of a module's state, in place.

    Raises:
        ValueError: if the names or shapes are others.
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
                target.to_local().copy_(stored.read(place, box_of(target)))
            else:
                target.copy_(stored.read(place))
