"""Finds records: local files, a folder saved by `datasets`, or a dataset of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import islice
from pathlib import Path

import datasets

from lit_distill.data.cache import cache_file, digest
from lit_distill.data.files import COMPRESSED, KINDS_OF_FILES, content_hash, kind_of_file, write_records
from lit_distill.types import check_sizes

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
RAW_VERSION = "1"
"""Part of the name of an Arrow file with the records of other files: increase it when what is read changes."""


@dataclass
class Records:
    """The location of a set of records with named fields.

    Args:
        path: file or glob (.jsonl, .json, .csv, .tsv, .parquet, .arrow, each also as .gz or .zst), or a list of them; a folder
            written by ``Dataset.save_to_disk``; or the id of a hub dataset, if there is no such file.
        split: which split of a hub dataset or a saved folder.
        config: which configuration of a hub dataset.
        revision: which commit, tag or branch of a hub dataset.
        max_records: take only so many records from the beginning; those of a hub dataset are streamed, so that the rest of it
            is not downloaded.
    """

    path: str | list[str]
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    max_records: int | None = None

    def __post_init__(self) -> None:
        check_sizes(max_records=self.max_records)

    def read(self, key: str = "", columns: Collection[str] | None = None) -> datasets.Dataset:
        """The raw columns as a dataset in a memory-mapped file; the fingerprint of local files is a hash of their content.

        Args:
            key: the argument that gives these records, for error messages; empty if that is this object.
            columns: the columns to read, by default all. Other columns of files keep their name, but their values are null.

        Raises:
            ValueError: if the path does not exist or a file is broken; the message names the key, or the file and line.
        """
        if (folder := self._saved_folder()) is not None:
            return self._first(self._read_saved(folder, key))
        files = find_files(self.path, KINDS_OF_FILES, _name(key, "path"))
        if files is None:
            return load_hub(
                self.path,
                split=self.split,
                config=self.config,
                revision=self.revision,
                key=key,
                max_records=self.max_records,
            )
        refuse_hub_options(self.config, self.revision, key)
        content, used = content_hash(files), None if columns is None else sorted(columns)
        cached = cache_file(digest(RAW_VERSION, content, used, [str(file) for file in files]))
        if not cached.exists():
            write_records(files, columns, cached)
        records = datasets.Dataset.from_file(str(cached))
        records._fingerprint = digest(content, used)  # the names of the files are no part of the content
        return self._first(records)

    def _first(self, records: datasets.Dataset) -> datasets.Dataset:
        count = self.max_records
        if count is None or count >= len(records):
            return records
        return records.select(range(count), new_fingerprint=digest(records._fingerprint, count))

    def _saved_folder(self) -> Path | None:
        path = Path(self.path).expanduser() if isinstance(self.path, str) else None
        saved = path is not None and any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        return path if saved else None

    def _read_saved(self, folder: Path, key: str) -> datasets.Dataset:
        refuse_hub_options(self.config, self.revision, key)
        found = datasets.load_from_disk(str(folder))
        if isinstance(found, datasets.DatasetDict):
            if self.split not in found:
                raise ValueError(
                    f"{_name(key, 'split')}: {folder} has no split {self.split!r}. Its splits are {', '.join(found)}."
                )
            found = found[self.split]
        return found


def _name(key: str, argument: str) -> str:
    return f"{key}.{argument}" if key else argument


def find_files(path: str | list[str], kinds: Sequence[str], key: str) -> list[Path] | None:
    """The files that match a path, a glob or a list of them, each glob in alphabetical order; None for a hub id.

    Raises:
        ValueError: if there is no such file or its kind is not in ``kinds``; the message names ``key``.
    """
    patterns = [path] if isinstance(path, str) else path
    if not patterns:
        raise ValueError(f"{key}: the list is empty. Name at least one file.")
    if len(patterns) == 1 and _looks_like_hub_id(patterns[0], kinds):
        return None
    files = [file for pattern in patterns for file in _expand(pattern, kinds, key)]
    for file in files:
        if kind_of_file(file) not in kinds:
            raise ValueError(
                f"{key}: {file} is none of {', '.join(kinds)}, also with {' or '.join(COMPRESSED)}. Convert it, or rename it if it "
                "is one."
            )
    return files


def _looks_like_hub_id(pattern: str, kinds: Sequence[str]) -> bool:
    is_file = Path(pattern).exists() or kind_of_file(Path(pattern)) in kinds
    return HUB_ID.fullmatch(pattern) is not None and not is_file


def _expand(pattern: str, kinds: Sequence[str], key: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise ValueError(
            f"{key}: {path} is a folder, and not one that `Dataset.save_to_disk` wrote. Name its files, as in "
            f"{path}/*{kinds[0]}."
        )
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
    path: str | list[str],
    *,
    split: str,
    config: str | None,
    revision: str | None,
    key: str,
    max_records: int | None = None,
) -> datasets.Dataset:
    """One split of a dataset of the Hugging Face hub, or of its local cache; its first records alone are streamed.

    Raises:
        ValueError: if loading fails; the message names ``key`` and the reason.
    """
    name = path if isinstance(path, str) else path[0]
    try:
        if max_records is None:
            return datasets.load_dataset(name, name=config, split=split, revision=revision)
        streamed = datasets.load_dataset(name, name=config, split=split, revision=revision, streaming=True)
        return datasets.Dataset.from_list(list(islice(streamed, max_records)))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{_name(key, 'path')}: {name!r} is not a file (looked in {Path.cwd()}), and loading it from the Hugging Face hub "
            f"(split {split!r}, config {config!r}, revision {revision!r}) failed: {error}"
        ) from error
