"""Tokenises records into rows of token ids; later runs with the same content read them from the cache."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.data.cache import cache_file, digest
from lit_distill.data.chat import AssistantTurns
from lit_distill.data.columns import ColumnMapping
from lit_distill.data.encoding import tokenizer_content
from lit_distill.data.files import ORIGIN
from lit_distill.data.formats import Format, recognise
from lit_distill.data.rows import FEATURES, RecordReader
from lit_distill.data.templates import Template, check_chat_template
from lit_distill.files import atomic_write

VERSION = "7"  # part of every fingerprint: increase it when the format of the rows changes
RECORDS_PER_PROCESS = 10_000
"""Fewer records are not worth another process."""
TEMPLATES: dict[Format, str] = {
    "instruction": "alpaca",
    "conversation": "chat",
    "completion": "{prompt}",
    "text": "{text}",
}
"""The template of a format, unless another one is asked for."""


def tokenize_records(
    records: datasets.Dataset,
    split: str,
    tokenizer: Any,
    *,
    template: Template | None,
    fields: ColumnMapping,
    responses: bool,
    drop_empty: bool = False,
    assistant_turns: AssistantTurns = "all",
    kept_fields: Collection[str] = (),
    num_proc: int | None = None,
    say: Callable[[str], None] = rank_zero_info,
) -> datasets.Dataset:
    """Rows of `FEATURES`, in the order of the records, not truncated.

    Prompt and response of an instruction are tokenised separately and concatenated, a conversation as a whole, so that a prompt
    has the same ids in training and in generation.

    Args:
        records: raw columns.
        split: name of the split, used for the ids of records without id, and in messages.
        tokenizer: a ``PreTrainedTokenizerBase``.
        template: renders the prompt; None takes the one of the format.
        fields: maps fields to columns.
        responses: whether every record must have a response. If false, references are read if the column exists.
        drop_empty: leave out records with an empty output instead of raising an error.
        assistant_turns: which turns of a conversation are learnt.
        kept_fields: further fields, or columns, that every row keeps as text, such as those that a teacher's prompt needs.
        num_proc: processes; by default one per CPU, and per 10,000 records.
        say: is told how the records are read.

    Raises:
        ValueError: for records of no known format, a missing field, an empty response, an unknown template variable or a
            conversation that the chat template does not reproduce; the message names the file and line, or the argument.
    """
    if not len(records):
        raise ValueError(f"{split}: there are no records. Give at least one.")
    columns = [name for name in records.column_names if name != ORIGIN]
    source = f"the {split} records"
    if ORIGIN in records.column_names:
        source += f" ({records[0][ORIGIN].rpartition(', ')[0]})"
    fields.check(columns, source, responses)
    kind = recognise(columns, fields, template, responses, records[0], source)
    if kind == "completion" and isinstance(fields.value(records[0], "prompt"), list):
        kind = "conversation"
    chosen = template or Template(TEMPLATES[kind])
    check_chat_template(chosen, tokenizer)
    if kind != "conversation":
        chosen.check(fields.known(columns))
    if responses and kind == "instruction":
        _require_output(fields, columns, source)
    fingerprint = digest(
        VERSION,
        records._fingerprint,
        split,
        tokenizer_content(tokenizer),
        chosen.text,
        sorted(fields.columns.items()),
        responses,
        drop_empty,
        kind,
        assistant_turns,
        sorted(kept_fields),
    )
    say(f"{split}: {_described(kind, fields, columns, chosen)}, rendered by {_named(chosen)}")
    reader = RecordReader(
        split, tokenizer, chosen, fields, kind, columns, responses, drop_empty, assistant_turns, kept_fields
    )
    return _mapped(records, reader.rows, fingerprint, split, num_proc)


def _described(kind: Format, fields: ColumnMapping, columns: list[str], template: Template) -> str:
    names: tuple[str, ...] = {
        "instruction": ("instruction", "input", "output"),
        "conversation": ("messages", "conversations", "prompt", "completion"),
        "completion": ("prompt", "completion"),
        "text": ("text",),
    }[kind]
    if kind == "conversation":
        names = (*names, "system", "tools")
    elif template.is_chat or "system" in template.variables:
        names = (*names, "system")
    found = [fields.columns[name] for name in names if fields.has(name, columns)]
    what = {"instruction": "instructions", "conversation": "conversations", "completion": "prompts with completions"}
    return f"{what.get(kind, 'plain texts')} in the columns {', '.join(found)}"


def _named(template: Template) -> str:
    return "the chat template" if template.is_chat else f"the template {template.text[:40]!r}"


def _mapped(
    records: datasets.Dataset, rows: Any, fingerprint: str, split: str, num_proc: int | None
) -> datasets.Dataset:
    """The rows of all records, from the cache or by as many processes as the records are worth, in one file."""
    cached = cache_file(fingerprint)
    if not cached.exists():
        processes = num_proc or min(os.cpu_count() or 1, len(records) // RECORDS_PER_PROCESS)
        cached.parent.mkdir(parents=True, exist_ok=True)
        parts = cached.with_name(f".{fingerprint}.{os.getpid()}.parts")
        try:
            mapped = records.map(
                rows,
                batched=True,
                with_indices=True,
                remove_columns=records.column_names,
                features=FEATURES,
                cache_file_name=str(parts),
                new_fingerprint=fingerprint,
                load_from_cache_file=False,
                num_proc=processes if processes > 1 else None,
                desc=f"Tokenizing {split}",
            )
        except ValueError as error:  # raised in another process, perhaps
            raise ValueError(str(error)) from error
        atomic_write(cached, partial(_write_rows, mapped), shared=True)
        for part in cached.parent.glob(f"{parts.name}*"):
            with suppress(OSError):  # Windows keeps what is mapped; the cache is complete
                part.unlink()
    found = datasets.Dataset.from_file(str(cached))
    found._fingerprint = fingerprint
    return found


def _write_rows(rows: datasets.Dataset, path: Path) -> None:
    schema = FEATURES.arrow_schema
    with pa.ipc.new_stream(str(path), schema) as writer:
        for table in rows.with_format("arrow").iter(RECORDS_PER_PROCESS):
            writer.write_table(table.cast(schema))


def check_ids(ids: Iterable[str]) -> None:
    """Raise if an id is used twice: `predict` uses the ids to find the items that are already in its file.

    Raises:
        ValueError: if an id is used twice; the message names it.
    """
    counts = Counter(ids)
    if duplicates := [name for name, count in counts.items() if count > 1]:
        raise ValueError(
            f"predict: {len(duplicates)} duplicate ids, such as {duplicates[0]!r} "
            f"({counts[duplicates[0]]} times). `predict` uses the ids to continue an unfinished file. Give each item its own id; "
            "fields.id names the column."
        )


def first_id_beyond(rows: datasets.Dataset, column: str, size: int) -> tuple[int, int] | None:
    """Index of the first row whose ``column`` contains an id >= ``size``, and that id; None if there is none."""
    seen = 0
    for table in rows.select_columns([column]).with_format("arrow").iter(10_000):
        values = table[column].combine_chunks()
        largest = pc.max(pc.list_flatten(values)).as_py()
        if largest is not None and largest >= size:
            lists = values.to_pylist()
            return next((seen + i, token) for i, ids in enumerate(lists) for token in ids if token >= size)
        seen += table.num_rows
    return None


def unshared_token(where: str, token: int, tokenizer: Any) -> str:
    """Error message for data with a token that the teacher does not have."""
    return (
        f"{where} contains the token {tokenizer.convert_ids_to_tokens(token)!r} ({token}), which the teacher's tokenizer lacks, so "
        "the teacher cannot score it. Remove it from the data, or choose another template or teacher."
    )


def _require_output(fields: ColumnMapping, columns: list[str], source: str) -> None:
    if not fields.has("output", columns):
        raise ValueError(
            f"fields.output: there is no column {fields.columns['output']!r} for the responses in {source}. The columns are "
            f"{', '.join(columns)}. Map `output` to one of them, or set responses to false for prompts only."
        )
