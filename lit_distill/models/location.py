"""Finds a model's files, and turns loading errors of libraries into messages that name the YAML key."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelLocation:
    """A folder, a hub repository or a GGUF file, in the form that `transformers` expects."""

    location: str
    """Absolute path of a local folder, or a hub id."""
    gguf_file: str | None
    """Name of the GGUF file in this folder or repository; None for a Hugging Face folder."""
    local: bool
    """False for a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for ``from_pretrained``, without those that are not set."""
        named = {"gguf_file": self.gguf_file, "revision": self.revision}
        return {name: value for name, value in named.items() if value is not None}


def resolve_location(path: str, key: str, gguf_file: str | None = None, revision: str | None = None) -> ModelLocation:
    """Resolve ``path``: a file or folder on this machine if it exists, else a hub id.

    Args:
        path: folder, ``.gguf`` file or hub id; ``~`` is expanded.
        key: YAML key of ``path``, for messages.
        gguf_file: file name inside the folder or repository.
        revision: for a hub id only.

    Raises:
        ValueError: if the path does not exist and cannot be a hub id, or if a package for reading GGUF is missing.
    """
    if not path:
        raise ValueError(f"{key} is empty. Give a local folder, a .gguf file or a Hugging Face hub id.")
    here = Path(path).expanduser()
    if here.is_file():
        if here.suffix != ".gguf":
            raise ValueError(f"{key}: {path} is a file. Give the folder that holds config.json, or a .gguf file.")
        folder, gguf_file = here.parent, here.name
    elif here.is_dir():
        folder = here
        if gguf_file is not None and not (folder / gguf_file).is_file():
            raise ValueError(f"{key}: there is no file {gguf_file!r} (gguf_file) in {path}.")
    elif path.startswith(("~", ".", "/", "\\")) or path.endswith((".gguf", "/")) or path.count("/") > 1:
        raise ValueError(
            f"{key}: {path} does not exist (current folder: {Path.cwd()}). Give a local folder or file, or a hub id."
        )
    else:
        folder = None
    if gguf_file is not None:
        _require_gguf(key, path)
    if folder is None:
        return ModelLocation(path, gguf_file, local=False, revision=revision)
    return ModelLocation(str(folder.resolve()), gguf_file, local=True)


def _require_gguf(key: str, path: str) -> None:
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(
            f"{key}: {path} is a GGUF file. Reading it needs the package(s) {', '.join(missing)}. "
            'Install them with: pip install "lit-distill[gguf]"'
        )


def check_folder(source: ModelLocation, key: str, weights: bool) -> None:
    """Check a local folder before anything is loaded from it.

    Args:
        source: location of the model; hub ids and GGUF files are not checked.
        key: YAML key of the path.
        weights: also require safetensors weights with all their shards.

    Raises:
        ValueError: if there is no config.json, or no complete safetensors weights.
    """
    if not source.local or source.gguf_file is not None:
        return
    folder = Path(source.location)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{key}: {folder} has no config.json{describe_found(folder)}")
    index = folder / "model.safetensors.index.json"
    if not weights or (folder / "model.safetensors").is_file():
        return
    if not index.is_file():
        raise ValueError(f"{key}: {folder} has no model.safetensors{describe_found(folder)}")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{key}: {index} is not an index of safetensors files: {error!r}. Copy it again.") from error
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ValueError(f"{key}: {folder} lacks {len(missing)} of {len(shards)} weight files: {', '.join(missing)}.")


def describe_found(folder: Path) -> str:
    """Describe what the folder contains instead, and what to do."""
    if (folder / "adapter_config.json").is_file():
        return ", only an adapter. Merge it into its base model (peft: `merge_and_unload`) and save the result."
    if (folder / "cache.json").is_file():
        return f", but is a teacher cache. Give it as model.teacher: {{class_path: CachedTeacher, init_args: {{path: {folder}}}}}."
    if ggufs := sorted(file.name for file in folder.glob("*.gguf")):
        return f", but GGUF files: {', '.join(ggufs)}. Give the path of the file itself."
    pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in sorted(folder.glob(pattern))]
    if pickles:
        return (
            f", only {', '.join(pickles)}: a pickle, which can run any code when it is opened, so it is never read. "
            'If you trust it, convert it once: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}')\""
        )
    return ". Give a folder that `save_pretrained` wrote, or a hub id."


@contextmanager
def wrap_load_errors(key: str, source: ModelLocation) -> Iterator[None]:
    """Turn any error that a library raises while loading a model into a ValueError that names the YAML key."""
    try:
        yield
    except Exception as error:  # the libraries have no common error class: tokenizers raises plain Exception
        if source.local:
            raise ValueError(
                f"{key}: {source.location} could not be loaded. {type(error).__name__}: {error}"
            ) from error
        raise ValueError(
            f"{key}: {source.location!r} is not a local folder, and could not be loaded from the Hugging Face hub. "
            f"{type(error).__name__}: {error}\n"
            "Give the path of a local folder. Without a network, download the model on another machine with `hf download`, "
            "set HF_HOME to that cache and HF_HUB_OFFLINE=1. For a gated model, run `hf auth login`."
        ) from error
