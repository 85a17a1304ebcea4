"""Checkpoints that are whole or not there at all, and that any number of ranks can read.

One file is what Lightning writes. A folder has ``meta.pt``, the same without the sharded tensors, and one safetensors file per
rank with that rank's pieces of them: a piece knows its tensor's place in the checkpoint, the tensor's shape and where in it the
piece begins. Nothing but tensors, numbers, text, and lists and dictionaries of them is ever unpickled.

A folder that is there is written anew by adding the files of another generation; ``meta.pt`` says which one counts and is
replaced last, in one step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_distill.atomic import flush, publish, remove, unfinished_name, write_whole
from lit_distill.parallel.sharding import Box, as_shard_of, box_of, slices, whole_of

META = "meta.pt"
"""The part of a checkpoint in a folder that is no shard; also Lightning's sign of one."""
GENERATION = "generation"
Place = tuple[str | int, ...]
"""Keys that lead from a checkpoint to one of its tensors."""


def _sharded(tree: Any, place: Place = ()) -> Iterator[tuple[Place, DTensor]]:
    if isinstance(tree, DTensor):
        yield place, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _sharded(value, (*place, key))
    elif type(tree) in (list, tuple):
        for index, value in enumerate(tree):
            yield from _sharded(value, (*place, index))


def _replaced(tree: Any, value_of: Callable[[DTensor], Any]) -> Any:
    if isinstance(tree, DTensor):
        return value_of(tree)
    if isinstance(tree, Mapping):
        return {key: _replaced(value, value_of) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_replaced(value, value_of) for value in tree)
    return tree


def _storage(tensor: DTensor) -> tuple[Any, ...]:
    """The same for two weights exactly if they share their memory, on all ranks alike, also where this rank's part is empty."""
    local = tensor.to_local()
    return int(local.untyped_storage()._cdata), local.storage_offset(), tuple(tensor.shape)


def gathered(tree: Any, keep: bool) -> Any:
    """``tree`` with whole tensors in host memory in the place of sharded ones; called by all ranks.

    One tensor is gathered at a time.

    Args:
        tree: dictionaries and lists with DTensors in them.
        keep: whether this rank wants them; the others get None for each.
    """
    seen: dict[Any, Any] = {}  # tied weights are one storage under several names

    def whole(tensor: DTensor) -> Any:
        key = _storage(tensor)
        if key not in seen:
            full = whole_of(tensor)
            seen[key] = full.cpu() if keep else None
        return seen[key]

    return _replaced(tree, whole)


def save_sharded(checkpoint: Mapping[str, Any], path: Path, rank: int, barrier: Callable[[], None]) -> None:
    """Write a checkpoint as a folder; called by all ranks, each of which writes its own pieces.

    Args:
        checkpoint: with DTensors where tensors are sharded.
        path: of the folder; what is there stays good until all of the new one is.
        rank: of this process.
        barrier: waits for all ranks.
    """
    again = (path / META).is_file()
    folder = path if again else unfinished_name(path)
    generation = 1 + torch.load(path / META, weights_only=True, mmap=True)[GENERATION] if again else 0
    barrier()
    if rank == 0 and again:
        _keep_generation(folder, generation - 1)  # another save may have been cut off
    elif rank == 0:
        remove(folder)
        folder.mkdir(parents=True)
    barrier()
    _write_pieces(checkpoint, folder / f"{generation}-rank-{rank:05d}.safetensors")
    barrier()
    if rank == 0:
        rest = {**_replaced(checkpoint, lambda _: None), GENERATION: generation}
        write_whole(folder / META, lambda file: torch.save(rest, file))
        if again:
            _keep_generation(folder, generation)
        else:
            publish(folder, path)
    barrier()


def _keep_generation(folder: Path, generation: int) -> None:
    for file in folder.glob("*-rank-*.safetensors"):
        if not file.name.startswith(f"{generation}-"):
            file.unlink()


def _has_first_copy(tensor: DTensor) -> bool:
    """Whether this is the one of the ranks that have the same part of a tensor which has to write it."""
    mesh = tensor.device_mesh
    dimensions = zip(mesh.get_coordinate() or (), tensor.placements, strict=True)
    among = not any(coordinate for coordinate, placement in dimensions if placement.is_replicate())
    return among and int(mesh.mesh.min()) == 0  # another mesh may have all of the tensor as well


def _write_pieces(checkpoint: Mapping[str, Any], file: Path) -> None:
    pieces: dict[str, Tensor] = {}
    index: list[dict[str, Any]] = []
    names: dict[Any, str] = {}
    for place, tensor in _sharded(checkpoint):
        local = tensor.to_local()
        if local.numel() and _has_first_copy(tensor):
            name = names.setdefault(_storage(tensor), str(len(names)))
            pieces[name] = local.detach().contiguous()
            index.append({"place": place, "piece": name, "shape": list(tensor.shape), "offset": box_of(tensor).offset})
    save_file(pieces, file, metadata={"index": json.dumps(index)})
    flush(file)


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
        pattern = f"{self.rest.get(GENERATION)}-rank-*.safetensors"
        for file in sorted(path.glob(pattern)) if folder else []:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            for entry in json.loads(opened.metadata()["index"]):
                place, offset = tuple(entry["place"]), tuple(entry["offset"])
                shape = tuple(opened.get_slice(entry["piece"]).get_shape())
                self._pieces.setdefault(place, []).append((opened, entry["piece"], Box(offset, shape)))
                self._shapes[place] = tuple(entry["shape"])

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


def load_into(stored: StoredCheckpoint, state: Mapping[str, Tensor], strict: bool) -> None:
    """Read this rank's part of every tensor of a module's state, in place.

    Raises:
        ValueError: if the names or shapes are others.
    """
    there = stored.rest["state_dict"]
    different = sorted(state.keys() ^ there.keys())
    if strict and different:
        raise ValueError(f"ckpt_path: {stored.path} is of another model: {different[0]!r} is on one side only.")
    with torch.no_grad():
        for name in state.keys() & there.keys():
            place, target = ("state_dict", name), state[name]
            if stored.shape(place) != tuple(target.shape):
                raise ValueError(
                    f"ckpt_path: {stored.path} is of another model: {name} is {stored.shape(place)} there and "
                    f"{tuple(target.shape)} here."
                )
            if isinstance(target, DTensor):
                target.to_local().copy_(stored.read(place, box_of(target)))
            else:
                target.copy_(stored.read(place))


class AtomicCheckpointIO(TorchCheckpointIO):
    """One file, written under another name first; reads folders too, so that any run goes on from any checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file, on one rank."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_whole(Path(path), lambda unfinished: torch.save(checkpoint, unfinished))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file, or gather a folder."""
        if Path(path).is_dir():
            return read_checkpoint(Path(path))
        where: Any = map_location or "cpu"
        return super().load_checkpoint(path, where, weights_only=weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a file or a folder, of which half would still look like a checkpoint: its name goes first."""
        if Path(path).is_dir():
            path = Path(path).rename(unfinished_name(Path(path)))
        super().remove_checkpoint(path)
