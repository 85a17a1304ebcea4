"""Tokenises records into rows of token ids; later runs with the same content read them from the cache."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from datasets import Features, List, Value

from lit_distill.data.columns import ColumnMapping
from lit_distill.data.files import ORIGIN
from lit_distill.data.special_tokens import prompt_prefix, response_end, with_prefix
from lit_distill.data.templates import Template, check_chat_template

VERSION = "4"  # part of every fingerprint: increase it when the format of the rows changes
FEATURES = Features(
    {
        "id": Value("string"),
        "prompt_ids": List(Value("int32")),  # with the special tokens that the tokenizer adds before a prompt
        "response_ids": List(Value("int32")),  # with EOS or the end of a turn; empty without responses
        "num_prefix_tokens": Value("int32"),  # tokens at the start of the prompt that truncation keeps (BOS)
        "references": List(Value("string")),
        "prompt_text": Value("string"),
    }
)


def tokenize_records(
    records: datasets.Dataset,
    split: str,
    tokenizer: Any,
    *,
    template: Template,
    fields: ColumnMapping,
    responses: bool,
    drop_empty: bool = False,
) -> datasets.Dataset:
    """Rows of `FEATURES`, in the order of the records, not truncated.

    Prompt and response are tokenised separately and concatenated, so a prompt has the same ids in training and in generation.

    Args:
        records: raw columns.
        split: name of the split, used for the ids of records without id, and in messages.
        tokenizer: a ``PreTrainedTokenizerBase``.
        template: renders the prompt.
        fields: maps fields to columns.
        responses: whether every record must have an output. If false, references are read if the column exists.
        drop_empty: leave out records with an empty output instead of raising an error.

    Raises:
        ValueError: for a missing field, an empty response or an unknown template variable; the message names the file and
            line, or the key.
    """
    if not len(records):
        raise ValueError(f"{split}: there are no records. Give at least one.")
    columns = [name for name in records.column_names if name != ORIGIN]
    source = f"the {split} records"
    if ORIGIN in records.column_names:
        source += f" ({records[0][ORIGIN].rpartition(', ')[0]})"
    fields.check(columns, source)
    check_chat_template(template, tokenizer)
    template.check(fields.known(columns))
    if responses:
        _require_output(fields, columns, source)
    with_references = responses or fields.has("references", columns) or fields.has("output", columns)
    fingerprint = digest(
        VERSION,
        records._fingerprint,
        split,
        tokenizer_content(tokenizer),
        template.text,
        sorted(fields.columns.items()),
        responses,
        drop_empty,
    )
    prefix = prompt_prefix(tokenizer, template)
    end = response_end(tokenizer, template)

    def rows(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {name: [] for name in ("id", "references", "prompt_text")}
        outputs, places, ends, prefixes = [], [], [], []
        for position, index in enumerate(indices):
            record = {name: values[position] for name, values in batch.items()}
            where = record.get(ORIGIN) or f"{split}, row {index + 1}"
            is_generated = record.get("finished") is not None
            may_be_empty = is_generated and fields.value(record, "output") == ""  # the model generated EOS first
            if drop_empty and responses and not may_be_empty and fields.is_empty(record, "output"):
                continue
            found["prompt_text"].append(_prompt(template, fields, record, where, tokenizer))
            identity = fields.value(record, "id")
            found["id"].append(f"{split}-{index}" if identity is None else str(identity))
            empty = [""] if may_be_empty and not fields.value(record, "references") else None
            found["references"].append(empty or (fields.references(record, where) if with_references else []))
            outputs.append(fields.filled(record, "output", where) if responses and not may_be_empty else "")
            places.append(where)
            # columns that `predict` wrote: prompts without BOS, responses truncated at max_new_tokens, stop tokens of the others
            prefixes.append([] if record.get("add_special_tokens") is False else prefix)
            ends.append([] if record.get("finished") is False else _stop_token_ids(record, tokenizer) or end)
        encoded = encode(tokenizer, found["prompt_text"])
        prompts = [with_prefix(before, ids) for before, ids in zip(prefixes, encoded, strict=True)]
        for ids, where in zip(prompts, places, strict=True):
            if not ids:
                raise ValueError(
                    f"{where}: the prompt is empty, so there is nothing to respond to. Fill it or remove the item."
                )
        response_ids: list[list[int]] = [[] for _ in outputs]
        if responses:
            response_ids = [ids + end for ids, end in zip(encode(tokenizer, outputs), ends, strict=True)]
        kept = [
            len(before) or int(ids[0] == tokenizer.bos_token_id) for before, ids in zip(prefixes, prompts, strict=True)
        ]
        return {**found, "prompt_ids": prompts, "response_ids": response_ids, "num_prefix_tokens": kept}

    return records.map(
        rows,
        batched=True,
        with_indices=True,
        remove_columns=records.column_names,
        features=FEATURES,
        cache_file_name=str(cache_file(fingerprint)),
        new_fingerprint=fingerprint,
        load_from_cache_file=True,
        desc=f"Tokenizing {split}",
    )


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
            "data.init_args.fields.id names the column."
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


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without the special tokens that the tokenizer would add."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def tokenizer_content(tokenizer: Any) -> str:
    """A digest of everything in a tokenizer that affects its ids; tokenizer calls do not change it."""
    if getattr(tokenizer, "is_fast", False):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content.pop("truncation", None)  # these two are set by the last call
        content.pop("padding", None)
    else:
        content = {
            "class": type(tokenizer).__qualname__,
            "vocab": tokenizer.get_vocab(),
            "init": repr(tokenizer.init_kwargs),
        }
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest(content, special, tokenizer.chat_template)


def cache_file(fingerprint: str) -> Path:
    """Path of the cached rows with this fingerprint, in the cache folder of ``datasets``."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "lit_distill" / f"{fingerprint}.arrow"


def digest(*parts: Any) -> str:
    """32 hex digits: a hash of the parts as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _require_output(fields: ColumnMapping, columns: list[str], source: str) -> None:
    if fields.has("output", columns):
        return
    turns = next((name for name in ("messages", "conversations") if name in columns), None)
    advice = (
        f"Conversations (`{turns}`) are not supported: write each prompt and its response as fields of a record."
        if turns
        else "Map `output` to one of them, or set data.init_args.responses to false for prompts only."
    )
    raise ValueError(
        f"fields.output: there is no column {fields.columns['output']!r} for the responses in {source}. "
        f"The columns are {', '.join(columns)}. {advice}"
    )


def _stop_token_ids(record: dict[str, Any], tokenizer: Any) -> list[int]:
    """The id of the stop token that `predict` recorded; empty if there is none or the tokenizer does not have it."""
    token = record.get("stop_token")
    ids = [] if token is None else [tokenizer.convert_tokens_to_ids(token)]
    return [] if ids in ([None], [tokenizer.unk_token_id]) else ids


def _prompt(template: Template, fields: ColumnMapping, record: dict[str, Any], where: str, tokenizer: Any) -> str:
    def field(name: str) -> str:
        return fields.filled(record, name, where) if name == "instruction" else fields.text(record, name, where)

    return template.render(field, tokenizer)
