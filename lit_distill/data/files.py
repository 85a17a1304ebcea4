"""Reads local files of records, plain or compressed, into one Arrow file; errors name the file, the line and the reason."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from lit_distill.files import atomic_write

ORIGIN = "__origin__"
"""Name of the column with the origin of each row: file and line, or file and row."""
KINDS_OF_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
"""What may follow the kind of a file in its name."""
NESTED = "\0json:"
"""How a value with objects in it begins in the Arrow file: Arrow would give every object the keys of all others."""

ROWS_AT_ONCE = 10_000
KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def kind_of_file(path: Path) -> str:
    """The ending that says how to read a file, such as ``.jsonl`` for ``train.jsonl.gz``."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed if its name ends in .gz or .zst."""
    if path.suffix == ".gz":
        return cast("BinaryIO", gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return cast("BinaryIO", io.BufferedReader(pa.input_stream(str(path), compression="zstd")))
    return path.open("rb")


def content_hash(paths: Sequence[Path]) -> str:
    """A digest of the bytes of the files, in their order; it does not depend on file names or dates."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.suffix} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]


def write_records(paths: Sequence[Path], columns: Collection[str] | None, target: Path) -> None:
    """Write all records of the files, in order, with the column `ORIGIN`, to one Arrow file; memory does not grow with them.

    Args:
        paths: the files.
        columns: the columns to read, by default all. Other columns keep their name, but their values are null, so they may
            contain anything. A key that is missing in a record becomes null.
        target: the Arrow file, in the streaming format.

    Raises:
        ValueError: if a file cannot be read; the message names the file and, except for Parquet and Arrow, the line.
    """
    atomic_write(
        target, lambda unfinished: _write_tables(record_tables(paths, columns), unfinished, paths), shared=True
    )


def record_tables(paths: Sequence[Path], columns: Collection[str] | None = None) -> Iterator[pa.Table]:
    """The records of the files, some thousands at a time; see `write_records`."""
    kinds: dict[str, tuple[str, str]] = {}
    for path in paths:
        count = 0
        binary = kind_of_file(path) in (".parquet", ".arrow")
        for table in _read_binary(path, columns) if binary else _object_tables(path, kinds, columns):
            count += table.num_rows
            yield table
        if not count:
            raise ValueError(f"{path}: the file holds no records. Add records, or remove the file from the list.")


def _write_tables(tables: Iterable[pa.Table], target: Path, paths: Sequence[Path]) -> None:
    """Write tables of different schemas with the schema of all; what is written already is written anew when it changes."""
    schema: pa.Schema | None = None
    writer: pa.RecordBatchStreamWriter | None = None
    earlier = target.with_name(f"{target.name}.earlier")
    try:
        for table in tables:
            wider = table.schema if schema is None else _unify(schema, table.schema, paths)
            if schema is None or not wider.equals(schema):
                if writer is not None:
                    writer.close()
                    target.replace(earlier)
                writer = pa.ipc.new_stream(str(target), wider)
                if earlier.exists():
                    with pa.memory_map(str(earlier)) as source:
                        for batch in pa.ipc.open_stream(source):
                            writer.write_table(_cast(pa.Table.from_batches([batch]), wider))
                    earlier.unlink()
                schema = wider
            assert writer is not None
            writer.write_table(_cast(table, wider))
    finally:
        if writer is not None:
            writer.close()
        earlier.unlink(missing_ok=True)


def _unify(one: pa.Schema, other: pa.Schema, paths: Sequence[Path]) -> pa.Schema:
    try:
        return pa.unify_schemas([one, other], promote_options="permissive")
    except pa.ArrowException as error:
        names = ", ".join(str(path) for path in paths)
        raise ValueError(f"{names}: a column has different types in different places: {error}") from error


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = []
    for name, kind in zip(schema.names, schema.types, strict=True):
        column = table[name] if name in table.column_names else pa.nulls(table.num_rows, kind)
        columns.append(
            column if column.type == kind else column.cast(kind)
        )  # the cast fails at some nulls inside lists
    return pa.Table.from_arrays(columns, schema=schema)


def _read_binary(path: Path, columns: Collection[str] | None) -> Iterator[pa.Table]:
    """The rows of a Parquet or Arrow file; columns that are not wanted are null."""
    row = 0
    try:
        for batch in _batches(path):
            table = pa.Table.from_batches([batch])
            for index, name in enumerate(table.column_names):
                if columns is not None and name not in columns:
                    table = table.set_column(index, name, pa.nulls(table.num_rows))
            origins = [f"{path}, row {row + number}" for number in range(1, table.num_rows + 1)]
            row += table.num_rows
            yield table.append_column(ORIGIN, pa.array(origins, pa.string()))
    except (pa.ArrowException, OSError, EOFError) as error:
        kind = "Parquet" if kind_of_file(path) == ".parquet" else "Arrow"
        raise ValueError(f"{path}: not readable as {kind}: {error}") from error


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    source = pa.py_buffer(open_binary(path).read()) if path.suffix in COMPRESSED else str(path)
    if kind_of_file(path) == ".parquet":
        with pq.ParquetFile(pa.BufferReader(source) if isinstance(source, pa.Buffer) else source) as file:
            yield from file.iter_batches(ROWS_AT_ONCE)
        return
    with pa.BufferReader(source) if isinstance(source, pa.Buffer) else pa.memory_map(source) as opened:
        try:
            yield from pa.ipc.open_stream(opened)
        except pa.ArrowInvalid:  # the format of files, with a table of contents at the end
            reader = pa.ipc.open_file(opened)
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))


def _object_tables(
    path: Path, kinds: dict[str, tuple[str, str]], columns: Collection[str] | None
) -> Iterator[pa.Table]:
    objects = read_objects(path)
    while rows := [{**_select_columns(row, columns), ORIGIN: origin} for origin, row in islice(objects, ROWS_AT_ONCE)]:
        for row in rows:
            _check_kinds(row, kinds)
        yield _to_table([{name: _without_objects(value) for name, value in row.items()} for row in rows])


def _select_columns(row: dict[str, Any], columns: Collection[str] | None) -> dict[str, Any]:
    return row if columns is None else {name: value if name in columns else None for name, value in row.items()}


def _without_objects(value: Any) -> Any:
    if value == []:  # is as good as missing, and fits beside lists of texts and of objects alike
        return None
    nested = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value))
    return NESTED + json.dumps(value) if nested else value


def with_objects(value: Any) -> Any:
    """A value of a record as it was read; keys without a value, which Arrow adds to the objects of Parquet files, are left out."""
    if isinstance(value, str):
        return json.loads(value.removeprefix(NESTED)) if value.startswith(NESTED) else value
    if isinstance(value, dict):
        return {key: with_objects(item) for key, item in value.items() if item is not None}
    return [with_objects(item) for item in value] if isinstance(value, list) else value


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


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a JSONL, JSON, CSV or TSV file, each with its origin: file and line, or file and item.

    Raises:
        ValueError: at the first line that is not a record in UTF-8; the message names file, line and reason.
    """
    kind = kind_of_file(path)
    if kind in (".csv", ".tsv"):
        yield from _read_csv(path, "," if kind == ".csv" else "\t")
    else:
        yield from _read_json(path) if kind == ".json" else _read_jsonl(path)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with open_binary(path) as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                where = f"{path}, line {number}"
                yield where, decode_utf8(line, where)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}, after line {number}: cannot be decompressed: {error}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, text in _lines(path):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise ValueError(f"{where}: not valid JSON: {reason}{column}. It begins {text.strip()[:60]!r}.") from error
        yield where, _as_object(value, where)


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with open_binary(path) as file:
            text = decode_utf8(file.read(), str(path))
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path}: not valid JSON: {error}.") from error
    except json.JSONDecodeError as error:
        hint = " One object per line is JSONL: name the file *.jsonl." if error.msg == "Extra data" else ""
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}.{hint}") from error
    records = value.get("data") if isinstance(value, dict) else value
    if not isinstance(records, list):
        raise ValueError(f'{path}: a JSON file must hold a list of objects, or {{"data": [...]}}.')
    for number, record in enumerate(records, start=1):
        where = f"{path}, item {number}"
        yield where, _as_object(record, where)


def _read_csv(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows below the header; all values are texts, and an empty one is null."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((text for _, text in _lines(path)), delimiter=delimiter, strict=True)
    line = 0
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or not all(name.strip() for name in header):
            raise ValueError(f"{path}, line 1: expected a header with a different name for each column, got {header}.")
        line = reader.line_num
        for row in reader:
            where = f"{path}, line {line + 1}"
            line = reader.line_num
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"{where}: {len(row)} values, but the header names {len(header)} columns: {', '.join(header)}. Put a value "
                    "with a separator or a line break in quotes."
                )
            yield where, {name: value or None for name, value in zip(header, row, strict=True)}
    except csv.Error as error:
        raise ValueError(f"{path}, line {line + 1}: not valid {kind_of_file(path)[1:].upper()}: {error}") from error


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
        raise ValueError(f"{where}: the file is compressed. Give it the ending .gz or .zst, or unpack it first.")
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
