"""Plain text, packed into rows of equal length, for a pre-training loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Features, List, Value
from datasets.arrow_writer import ArrowWriter
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.data.cache import cache_file, digest
from lit_distill.data.encoding import encode, tokenizer_content
from lit_distill.data.files import (
    KINDS_OF_FILES,
    ORIGIN,
    content_hash,
    decode_utf8,
    kind_of_file,
    open_binary,
    record_tables,
)
from lit_distill.data.records import find_files, load_hub, refuse_hub_options
from lit_distill.data.special_tokens import required_eos
from lit_distill.data.tokenize import VERSION
from lit_distill.files import atomic_write
from lit_distill.types import ArgumentError, arguments_of, check_sizes

FEATURES = Features({"input_ids": List(Value("int32"))})
DOCUMENTS_AT_ONCE = 1_000


@dataclass(kw_only=True)
class PackedText:
    """Plain text, packed into rows of ``length`` tokens, which are added to the training batches.

    Args:
        length: tokens of a row; every row has exactly this many.
        batch_size: rows per batch over all ranks.
    """

    length: int = 256
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(
                f"length: expected at least 2, got {self.length}: a token is predicted from the tokens before it."
            )
        check_sizes(batch_size=self.batch_size)

    def documents(self) -> tuple[str, Iterator[str]]:
        """A fingerprint of the content, and the texts. Override only this method to read text from another source."""
        raise ArgumentError(self, f"{type(self).__name__} does not implement documents(), which returns the text.")

    def origin(self) -> str:
        """Argument and name of the source of the texts, for error messages."""
        return type(self).__name__

    def rows(self, tokenizer: Any) -> datasets.Dataset:
        """Rows of ``length`` token ids, with EOS after every document; the last tokens are left out if they do not fill a row.

        Raises:
            ValueError: if a file cannot be read (the message names file and line), or if the text does not fill one row.
        """
        with arguments_of(self):
            source, texts = self.documents()
            cached = cache_file(digest("corpus", VERSION, source, tokenizer_content(tokenizer), self.length))
            if not cached.exists():
                _write(cached, texts, tokenizer, self.length, self.origin())
        return datasets.Dataset.from_file(str(cached))


@dataclass
class Corpus(PackedText):
    """Packed text from files or the hub.

    Args:
        path: .txt files (blank lines between documents), or files of records as for ``train`` with a text field; or a hub id.
        text_field: the column with the text of a document; not used for .txt files.
        split: which split of a hub dataset.
        config: which configuration of a hub dataset.
        revision: which revision of a hub dataset.
        length: tokens of a row; every row has exactly this many.
        batch_size: rows per batch over all ranks.
    """

    path: str | list[str]
    text_field: str = "text"
    split: str = "train"
    config: str | None = None
    revision: str | None = None

    def documents(self) -> tuple[str, Iterator[str]]:
        """A fingerprint, and the texts of the files in their order or of the hub dataset."""
        files = find_files(self.path, (".txt", *KINDS_OF_FILES), "path")
        if files is None:
            hub = load_hub(self.path, split=self.split, config=self.config, revision=self.revision, key="")
            return digest(hub._fingerprint, self.text_field), self._from_hub(hub)
        refuse_hub_options(self.config, self.revision, "")
        texts = (text for file in files for text in self._from_file(file))
        return digest(content_hash(files), self.text_field), texts

    def origin(self) -> str:
        """Argument and files, for error messages."""
        return f"path: {self.path if isinstance(self.path, str) else ', '.join(self.path)}"

    def _from_file(self, file: Path) -> Iterator[str]:
        if kind_of_file(file) == ".txt":
            yield from _paragraphs(file)
            return
        for table in record_tables([file], [self.text_field]):
            if self.text_field not in table.column_names:
                names = ", ".join(name for name in table.column_names if name != ORIGIN)
                raise ValueError(f"text_field: {file} has no column {self.text_field!r}, only {names}.")
            for where, value in zip(table[ORIGIN].to_pylist(), table[self.text_field].to_pylist(), strict=True):
                yield self._text(value, where)

    def _from_hub(self, records: datasets.Dataset) -> Iterator[str]:
        if self.text_field not in records.column_names:
            names = ", ".join(records.column_names)
            raise ValueError(f"text_field: {self.path} has no column {self.text_field!r}, only {names}.")
        for number, record in enumerate(records.select_columns([self.text_field]), start=1):
            yield self._text(record[self.text_field], f"{self.path}, row {number}")

    def _text(self, value: object, where: str) -> str:
        if not isinstance(value, str):
            problem = "is missing" if value is None else f"is {type(value).__name__}, not text"
            raise ValueError(
                f"{where}: the field `{self.text_field}` {problem}. Correct it, or set text_field to another column."
            )
        return value


def _paragraphs(file: Path) -> Iterator[str]:
    lines: list[str] = []
    with open_binary(file) as stream:
        for number, line in enumerate(stream, start=1):
            text = decode_utf8(line, f"{file}, line {number}").rstrip("\r\n")
            if text.strip():
                lines.append(text)
            elif lines:
                yield "\n".join(lines)
                lines = []
    if lines:
        yield "\n".join(lines)


def _pack(texts: Iterable[str], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Rows of ``length`` ids, then one shorter, possibly empty row with the remaining ids."""
    eos = required_eos(tokenizer)
    buffer: list[int] = []
    texts = iter(text for text in texts if text.strip())
    while documents := list(islice(texts, DOCUMENTS_AT_ONCE)):
        for ids in encode(tokenizer, documents):
            buffer += ids
            buffer.append(eos)
        full = len(buffer) // length * length
        for start in range(0, full, length):
            yield buffer[start : start + length]
        buffer = buffer[full:]
    yield buffer


def _write(target: Path, texts: Iterable[str], tokenizer: Any, length: int, origin: str) -> None:
    count, tail = 0, 0

    def write(partial: Path) -> None:
        nonlocal count, tail
        with ArrowWriter(path=str(partial), features=FEATURES) as writer:
            for row in _pack(texts, tokenizer, length):
                if len(row) < length:
                    tail = len(row)
                    break
                writer.write({"input_ids": row})
                count += 1
            if count:
                writer.finalize()
        if not count:
            problem = (
                f"has {tail} tokens, too few for one row of {length}" if tail else "is empty: there is no text in it"
            )
            raise ValueError(f"{origin} {problem}. Give more text{', or a smaller length' if tail else ''}.")

    atomic_write(target, write, shared=True)  # with runs that use the same cache
    rank_zero_info(
        f"corpus: packed {count} rows of {length} tokens; {tail} tokens at the end do not fill a row and are left out"
    )
