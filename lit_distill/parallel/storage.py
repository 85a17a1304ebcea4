"""Checkpoints that are whole or not there at all, and that any number of ranks can read.

One file is what Lightning writes. A folder has ``meta.pt``, the same without the sharded tensors, and one safetensors file per
rank with that rank's pieces of them: a piece knows its tensor's place in the checkpoint, the tensor's shape and where in it the
piece begins. Nothing but tensors, numbers, text, and lists and dictionaries of them is ever unpickled.

A folder that is there is written anew by adding the files of another generation; ``meta.pt`` says which one counts and is
replaced last, in one step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_distill.atomic import flush, naming_a_full_disk, publish, remove, unfinished_name, write_whole
from lit_distill.parallel.reading import GENERATION, META, RANKS, Place, read_checkpoint
from lit_distill.parallel.sharding import box_of, whole_of


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
        ranks = len(list(folder.glob(f"{generation}-rank-*.safetensors")))
        rest = {**_replaced(checkpoint, lambda _: None), GENERATION: generation, RANKS: ranks}
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
    with naming_a_full_disk(file):
        save_file(pieces, file, metadata={"index": json.dumps(index)})
        flush(file)


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
