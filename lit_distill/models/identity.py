"""Which model a spec means: the same in another folder is the same, and another one in the same folder is not."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_distill.models.source import locate

if TYPE_CHECKING:
    from lit_distill.models.spec import ModelSpec

SAMPLES, SAMPLE = 16, 4096
"""How many pieces of a file are read, and how many bytes of each."""


def identity_of(spec: ModelSpec, key: str) -> dict[str, Any]:
    """Plain values that tell the model of ``spec`` from others, however it is loaded.

    Args:
        spec: the model.
        key: its YAML key, for messages.
    """
    source = locate(spec.path, f"{key}.path", spec.gguf_file, spec.revision)
    content = _content(source.location, source.gguf_file) if source.local and not spec.from_scratch else None
    layers = [spec.keep_layers, spec.drop_layers]
    return {"path": spec.path, "revision": spec.revision, "layers": layers, "content": content}


def is_same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two identities are of one model: by the weights where both have them, else by name."""
    if one["layers"] != other["layers"]:
        return False
    if one["content"] and other["content"]:
        return bool(one["content"] == other["content"])
    return (one["path"], one["revision"]) == (other["path"], other["revision"])


@lru_cache(maxsize=8)
def _content(folder: str, gguf_file: str | None) -> str | None:
    """A digest of the sizes of the weight files and of some bytes from all over them."""
    files = [Path(folder) / gguf_file] if gguf_file else sorted(Path(folder).glob("*.safetensors"))
    code = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        code.update(str(size).encode())
        with file.open("rb") as opened:
            for place in range(SAMPLES):
                opened.seek(max(0, (size - SAMPLE) * place // (SAMPLES - 1)))
                code.update(opened.read(SAMPLE))
    return code.hexdigest()[:32] if files else None
