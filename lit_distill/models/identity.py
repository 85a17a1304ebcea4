"""Identifies the model of a spec by its weights, so that a moved copy is the same model and replaced files are a different one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lit_distill.models.location import resolve_location

if TYPE_CHECKING:
    from lit_distill.models.spec import ModelSpec

SAMPLE, STRIDE, MOST = 4096, 2**16, 2**14
"""Bytes in a sample, bytes from the start of one to that of the next, and about how many are read of a file at most (64 MB)."""
SCHEME = "2-"
"""Begins the digests of this version; those of another are not compared."""


def identity_of(spec: ModelSpec, key: str) -> dict[str, Any]:
    """Plain values that identify the model of ``spec``, independent of how it is loaded.

    Args:
        spec: the model.
        key: its YAML key, for messages.
    """
    source = resolve_location(spec.path, f"{key}.path", spec.gguf_file, spec.revision)
    content = _content(source.location, source.gguf_file) if source.local and not spec.from_scratch else None
    layers = [spec.keep_layers, spec.drop_layers]
    return {"path": spec.path, "revision": spec.revision, "layers": layers, "content": content}


def weights_digest(spec: ModelSpec, key: str, checkpoint: Path | None = None) -> str:
    """32 hexadecimal digits that identify the weights of ``spec``, or those that a checkpoint puts in their place.

    Args:
        spec: the model.
        key: its YAML key, for messages.
        checkpoint: a file, or the folder of a sharded checkpoint, whose weights replace those of the model; one that is not on
            this machine is known by its address.
    """
    one = identity_of(spec, key)
    parts = [one["layers"], one["content"] or [one["path"], one["revision"]]]
    if checkpoint is not None:
        files = sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]
        found = [file for file in files if file.is_file()]
        parts.append(_digest(found) if found else str(checkpoint))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def is_same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two identities are the same model: by the weights if both have a digest of them, else by path and revision."""
    if one["layers"] != other["layers"]:
        return False
    digests = [identity["content"] for identity in (one, other)]
    if all(digests) and len({digest.rpartition("-")[0] for digest in digests}) == 1:
        return digests[0] == digests[1]
    return (one["path"], one["revision"]) == (other["path"], other["revision"])


@lru_cache(maxsize=8)
def _content(folder: str, gguf_file: str | None) -> str | None:
    files = [Path(folder) / gguf_file] if gguf_file else sorted(Path(folder).glob("*.safetensors"))
    return _digest(files) if files else None


def _digest(files: Iterable[Path]) -> str:
    """Digest of files: of their sizes, of samples spread evenly over each, and of the beginning of every tensor of safetensors."""
    code = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        code.update(str(size).encode())
        with file.open("rb") as opened:
            starts = {*range(0, size, max(STRIDE, size // MOST)), max(0, size - SAMPLE)}
            if file.suffix == ".safetensors":
                starts.update(_tensor_starts(opened))
            for start in sorted(starts):
                opened.seek(start)
                code.update(opened.read(SAMPLE))
    return SCHEME + code.hexdigest()[:32]


def _tensor_starts(opened: BinaryIO) -> list[int]:
    """Where the tensors of a safetensors file begin; none if its header is damaged, which is an error when it loads."""
    length = int.from_bytes(opened.read(8), "little")
    try:
        header = json.loads(opened.read(length))
        return [8 + length + int(entry["data_offsets"][0]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, MemoryError):
        return []
