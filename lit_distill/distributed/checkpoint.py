"""Checkpoints that are written atomically and can be loaded by any number of ranks.

A single file has Lightning's format. A folder has ``meta.pt``, which is the same without the sharded tensors, and one safetensors
file per rank with that rank's pieces of these tensors. For each piece, the file stores the tensor's key path in the checkpoint, the
tensor's shape and the offset of the piece in it. Only tensors, numbers, strings, and lists and dictionaries of them are unpickled.

An existing folder is overwritten by adding the files of a new generation. ``meta.pt`` has the number of the valid generation; it is
replaced last, in one atomic step.
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

from lit_distill.distributed.sharding import full_tensor, shard_slice
from lit_distill.distributed.stored import GENERATION, META, RANKS, KeyPath, read_checkpoint
from lit_distill.files import atomic_write, commit, flush, remove, report_full_disk, temporary_path


def _sharded(tree: Any, place: KeyPath = ()) -> Iterator[tuple[KeyPath, DTensor]]:
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
    """Key that is equal for two tensors if and only if they share memory, on every rank, even if this rank's part is empty."""
    local = tensor.to_local()
    return int(local.untyped_storage()._cdata), local.storage_offset(), tuple(tensor.shape)


def gathered(tree: Any, keep: bool) -> Any:
    """Replace sharded tensors in ``tree`` with full tensors in CPU memory; a collective.

    One tensor is gathered at a time.

    Args:
        tree: dictionaries and lists that contain DTensors.
        keep: whether this rank keeps the full tensors; otherwise each is replaced with None.
    """
    seen: dict[Any, Any] = {}  # tied weights share one storage under several names

    def gather(tensor: DTensor) -> Any:
        key = _storage(tensor)
        if key not in seen:
            full = full_tensor(tensor)
            seen[key] = full.cpu() if keep else None
        return seen[key]

    return _replaced(tree, gather)


def save_sharded(checkpoint: Mapping[str, Any], path: Path, rank: int, barrier: Callable[[], None]) -> None:
    """Write a checkpoint as a folder; a collective in which each rank writes its own pieces.

    Args:
        checkpoint: the checkpoint, with sharded tensors as DTensors.
        path: the folder; an existing checkpoint stays valid until the new one is complete.
        rank: rank of this process.
        barrier: function that waits for all ranks.
    """
    exists = (path / META).is_file()
    folder = path if exists else temporary_path(path)
    generation = 1 + torch.load(path / META, weights_only=True, mmap=True)[GENERATION] if exists else 0
    barrier()
    if rank == 0 and exists:
        _keep_generation(folder, generation - 1)  # remove files of an interrupted save
    elif rank == 0:
        remove(folder)
        folder.mkdir(parents=True)
    barrier()
    _write_pieces(checkpoint, folder / f"{generation}-rank-{rank:05d}.safetensors")
    barrier()
    if rank == 0:
        ranks = len(list(folder.glob(f"{generation}-rank-*.safetensors")))
        rest = {**_replaced(checkpoint, lambda _: None), GENERATION: generation, RANKS: ranks}
        atomic_write(folder / META, lambda file: torch.save(rest, file))
        if exists:
            _keep_generation(folder, generation)
        else:
            commit(folder, path)
    barrier()


def _keep_generation(folder: Path, generation: int) -> None:
    for file in folder.glob("*-rank-*.safetensors"):
        if not file.name.startswith(f"{generation}-"):
            file.unlink()


def _has_first_copy(tensor: DTensor) -> bool:
    """Whether this rank has to write its part of a tensor: it is the first of the ranks that have the same part."""
    mesh = tensor.device_mesh
    dimensions = zip(mesh.get_coordinate() or (), tensor.placements, strict=True)
    is_first = not any(coordinate for coordinate, placement in dimensions if placement.is_replicate())
    return is_first and int(mesh.mesh.min()) == 0  # another mesh may have the whole tensor too


def _write_pieces(checkpoint: Mapping[str, Any], file: Path) -> None:
    pieces: dict[str, Tensor] = {}
    index: list[dict[str, Any]] = []
    names: dict[Any, str] = {}
    for place, tensor in _sharded(checkpoint):
        local = tensor.to_local()
        if local.numel() and _has_first_copy(tensor):
            name = names.setdefault(_storage(tensor), str(len(names)))
            pieces[name] = local.detach().contiguous()
            index.append(
                {"place": place, "piece": name, "shape": list(tensor.shape), "offset": shard_slice(tensor).offset}
            )
    with report_full_disk(file):
        save_file(pieces, file, metadata={"index": json.dumps(index)})
        flush(file)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints as one file, atomically; loads files and folders, so that a run can resume from either."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file; called on one rank."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            atomic_write(Path(path), lambda unfinished: torch.save(checkpoint, unfinished))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a file, or a folder with its tensors put together."""
        if Path(path).is_dir():
            return read_checkpoint(Path(path))
        where: Any = map_location or "cpu"
        return super().load_checkpoint(path, where, weights_only=weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a file or a folder. A folder is renamed first, since a half-deleted one would still look like a checkpoint."""
        if Path(path).is_dir():
            path = Path(path).rename(temporary_path(Path(path)))
        super().remove_checkpoint(path)
