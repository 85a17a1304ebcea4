"""Reads local JSONL, JSON and Parquet files into one Arrow table; errors name the file, the line and the reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ORIGIN = "__origin__"
"""Name of the column with the origin of each row: file and line, or file and row."""

ROWS_AT_ONCE = 10_000
KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def content_hash(paths: Sequence[Path]) -> str:
    """A digest of the bytes of the files, in their order; it does not depend on file names or dates."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.suffix} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a JSONL or JSON file, each with its origin: file and line, or file and item.

    Raises:
        ValueError: at the first line that is not a JSON object in UTF-8; the message names file, line and reason.
    """
    yield from _read_json(path) if path.suffix == ".json" else _read_jsonl(path)


def read_tables(paths: Sequence[Path], columns: Collection[str] | None = None) -> pa.Table:
    """All records of the files, in order, with the column `ORIGIN`. A key that is missing in a record becomes null.

    Args:
        paths: the files.
        columns: the columns to read, by default all. Other columns keep their name, but their values are null, so they may
            contain anything.

    Raises:
        ValueError: if a file cannot be read; the message names the file and, for JSON, the line.
    """
    kinds: dict[str, tuple[str, str]] = {}
    tables: list[pa.Table] = []
    for path in paths:
        found = list(
            _read_parquet(path, columns) if path.suffix == ".parquet" else _object_tables(path, kinds, columns)
        )
        if not sum(table.num_rows for table in found):
            raise ValueError(f"{path}: the file holds no records. Add records, or remove the file from the list.")
        tables += found
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        names = ", ".join(str(path) for path in paths)
        raise ValueError(f"{names}: a column has different types in different places: {error}") from error


def _read_parquet(path: Path, columns: Collection[str] | None) -> Iterator[pa.Table]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as Parquet: {error}") from error
    for index, name in enumerate(table.column_names):
        if columns is not None and name not in columns:
            table = table.set_column(index, name, pa.nulls(table.num_rows))
    origins = pa.array([f"{path}, row {row}" for row in range(1, table.num_rows + 1)], pa.string())
    yield table.append_column(ORIGIN, origins)


def _object_tables(
    path: Path, kinds: dict[str, tuple[str, str]], columns: Collection[str] | None
) -> Iterator[pa.Table]:
    objects = read_objects(path)
    while rows := [{**_select_columns(row, columns), ORIGIN: origin} for origin, row in islice(objects, ROWS_AT_ONCE)]:
        for row in rows:
            _check_kinds(row, kinds)
        yield _to_table(rows)


def _select_columns(row: dict[str, Any], columns: Collection[str] | None) -> dict[str, Any]:
    return row if columns is None else {name: value if name in columns else None for name, value in row.items()}


def _check_kinds(row: dict[str, Any], kinds: dict[str, tuple[str, str]]) -> None:
    origin = row[ORIGIN]
    for name, value in row.items():
        if value is None:
            continue
        kind = KINDS[type(value)]
        expected, first = kinds.setdefault(name, (kind, origin))
        if kind != expected:
            raise ValueError(f"{origin}: `{name}` is {kind}, but {expected} in {first}. Give it one type everywhere.")


def _to_table(rows: list[dict[str, Any]]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    failures = (pa.ArrowException, UnicodeError, OverflowError)
    try:
        return pa.table({name: [row.get(name) for row in rows] for name in names})
    except failures as error:
        for row in rows:
            try:
                pa.Table.from_pylist([row])
            except failures as reason:
                raise ValueError(f"{row[ORIGIN]}: a value cannot be stored: {reason}") from reason
        span = f"{rows[0][ORIGIN]} to {rows[-1][ORIGIN]}"
        raise ValueError(f"{span}: a column mixes types inside its lists or objects: {error}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            text = decode_utf8(line, where)
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = getattr(error, "msg", str(error))
                column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                raise ValueError(
                    f"{where}: not valid JSON: {reason}{column}. It begins {text.strip()[:60]!r}."
                ) from error
            yield where, _as_object(value, where)


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = decode_utf8(path.read_bytes(), str(path))
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = " One object per line is JSONL: name the file *.jsonl." if error.msg == "Extra data" else ""
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}.{hint}") from error
    records = value.get("data") if isinstance(value, dict) else value
    if not isinstance(records, list):
        raise ValueError(f'{path}: a JSON file must hold a list of objects, or {{"data": [...]}}.')
    for number, record in enumerate(records, start=1):
        where = f"{path}, item {number}"
        yield where, _as_object(record, where)


def _as_object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(
            f'{where}: a record must be a JSON object {{"name": value}}, not {KINDS.get(type(value), "null")}.'
        )
    return value


def decode_utf8(data: bytes, where: str) -> str:
    """Decode UTF-8 bytes, without a byte-order mark.

    Raises:
        ValueError: for compressed or binary data or another encoding; the message begins with ``where``.
    """
    if data.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")):
        raise ValueError(f"{where}: the file is compressed. Unpack it first.")
    if b"\0" in data:
        raise ValueError(
            f"{where}: found a zero byte, so this is binary data or UTF-16, not UTF-8 text. Convert the file to UTF-8."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise ValueError(
            f"{where}: not UTF-8 text: byte 0x{byte:02x} at position {error.start + 1}. Convert the file to UTF-8."
        ) from error
