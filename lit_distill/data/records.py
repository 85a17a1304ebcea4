"""Reads records from local files or from a dataset of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

import datasets

from lit_distill.data.files import content_hash, read_tables

RECORD_FILES = (".jsonl", ".json", ".parquet")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass
class Records:
    """The location of a set of records with named fields.

    Args:
        path: file or glob (.jsonl, .json, .parquet), or a list of them; or the id of a hub dataset, if no such file exists.
        split: which split of a hub dataset.
        config: which configuration of a hub dataset.
        revision: which commit, tag or branch of a hub dataset.
    """

    path: str | list[str]
    split: str = "train"
    config: str | None = None
    revision: str | None = None

    def read(self, key: str = "", columns: Collection[str] | None = None) -> datasets.Dataset:
        """The raw columns as a dataset; the fingerprint of local files is a hash of their content.

        Args:
            key: the argument that gives these records, for error messages; empty if that is this object.
            columns: the columns to read, by default all. Other columns of files keep their name, but their values are null.

        Raises:
            ValueError: if the path does not exist or a file is broken; the message names the key, or the file and line.
        """
        files = find_files(self.path, RECORD_FILES, _name(key, "path"))
        if files is None:
            return load_hub(self.path, split=self.split, config=self.config, revision=self.revision, key=key)
        refuse_hub_options(self.config, self.revision, key)
        used = [] if columns is None else sorted(columns)
        fingerprint = hashlib.sha256("/".join([content_hash(files), *used]).encode()).hexdigest()[:32]
        return datasets.Dataset(read_tables(files, columns), fingerprint=fingerprint)


def _name(key: str, argument: str) -> str:
    return f"{key}.{argument}" if key else argument


def find_files(path: str | list[str], suffixes: Sequence[str], key: str) -> list[Path] | None:
    """The files that match a path, a glob or a list of them, each glob in alphabetical order; None for a hub id.

    Raises:
        ValueError: if there is no such file or its suffix is not in ``suffixes``; the message names ``key``.
    """
    patterns = [path] if isinstance(path, str) else path
    if not patterns:
        raise ValueError(f"{key}: the list is empty. Name at least one file.")
    if len(patterns) == 1 and _looks_like_hub_id(patterns[0], suffixes):
        return None
    files = [file for pattern in patterns for file in _expand(pattern, suffixes, key)]
    for file in files:
        if file.suffix not in suffixes:
            raise ValueError(f"{key}: {file} is none of {', '.join(suffixes)}. Convert it, or rename it if it is one.")
    return files


def _looks_like_hub_id(pattern: str, suffixes: Sequence[str]) -> bool:
    return HUB_ID.fullmatch(pattern) is not None and not Path(pattern).exists() and Path(pattern).suffix not in suffixes


def _expand(pattern: str, suffixes: Sequence[str], key: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise ValueError(f"{key}: {path} is a folder. Name its files, as in {path}/*{suffixes[0]}.")
    if path.is_file():
        return [path]
    found = sorted(Path(name) for name in glob(str(path), recursive=True) if Path(name).is_file())  # noqa: PTH207 - may be absolute
    if not found:
        what = "no file matches" if has_magic(pattern) else "there is no file"
        raise ValueError(f"{key}: {what} {pattern!r} (looked in {Path.cwd()}). Correct the path.")
    return found


def refuse_hub_options(config: str | None, revision: str | None, key: str) -> None:
    """Raise if options of hub datasets are given for local files."""
    for name, value in (("config", config), ("revision", revision)):
        if value is not None:
            raise ValueError(
                f"{_name(key, name)}: {value!r} was given, but path names files. It is for hub datasets only."
            )


def load_hub(
    path: str | list[str], *, split: str, config: str | None, revision: str | None, key: str
) -> datasets.Dataset:
    """One split of a dataset of the Hugging Face hub, or of its local cache.

    Raises:
        ValueError: if loading fails; the message names ``key`` and the reason.
    """
    name = path if isinstance(path, str) else path[0]
    try:
        return datasets.load_dataset(name, name=config, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{_name(key, 'path')}: {name!r} is not a file (looked in {Path.cwd()}), and loading it from the Hugging Face hub "
            f"(split {split!r}, config {config!r}, revision {revision!r}) failed: {error}"
        ) from error
