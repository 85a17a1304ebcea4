"""Identifies the model of a spec by its weights, so that a moved copy is the same model and replaced files are a different one."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_distill.models.location import resolve_location

if TYPE_CHECKING:
    from lit_distill.models.spec import ModelSpec

SAMPLES, SAMPLE = 16, 4096
"""Number of samples read from a file, and bytes in each."""


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


def is_same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two identities are the same model: by the weights if both have a digest of them, else by path and revision."""
    if one["layers"] != other["layers"]:
        return False
    if one["content"] and other["content"]:
        return bool(one["content"] == other["content"])
    return (one["path"], one["revision"]) == (other["path"], other["revision"])


@lru_cache(maxsize=8)
def _content(folder: str, gguf_file: str | None) -> str | None:
    """Digest of the weight files: of their sizes and of samples spread evenly over each."""
    files = [Path(folder) / gguf_file] if gguf_file else sorted(Path(folder).glob("*.safetensors"))
    code = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        code.update(str(size).encode())
        with file.open("rb") as opened:
            for index in range(SAMPLES):
                opened.seek(max(0, (size - SAMPLE) * index // (SAMPLES - 1)))
                code.update(opened.read(SAMPLE))
    return code.hexdigest()[:32] if files else None
