"""Records become rows of token ids once; later runs find them in the cache by content."""

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

from lit_distill.data.fields import Fields
from lit_distill.data.files import ORIGIN
from lit_distill.data.special_tokens import prompt_prefix, response_end, with_prefix
from lit_distill.data.templates import Template, check_chat_template

VERSION = "3"  # part of every fingerprint: raise it when the rows change
FEATURES = Features(
    {
        "id": Value("string"),
        "prompt_ids": List(Value("int32")),  # with the special tokens that the tokenizer puts before a prompt
        "response_ids": List(Value("int32")),  # with EOS or the end of a turn; empty where there are no responses
        "kept": Value("int32"),  # how many tokens at the start of the prompt a cut must spare (BOS)
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
    fields: Fields,
    responses: bool,
    drop_empty: bool = False,
) -> datasets.Dataset:
    """Rows of `FEATURES`, in the records' order, whatever their length.

    Prompt and response are tokenised apart and joined, so a prompt has the same ids in training and in generation.

    Args:
        records: raw columns.
        split: for the ids of records that have none, and for messages.
        tokenizer: a ``PreTrainedTokenizerBase``.
        template: writes the prompt.
        fields: says which column holds what.
        responses: whether every record must have an output. Without them, references are read where the column exists.
        drop_empty: leave out records whose output is empty, rather than refuse them.

    Raises:
        ValueError: naming the place, for a missing field, an empty response, an unknown variable of the template.
    """
    if not len(records):
        raise ValueError(f"data.init_args.{split}: there are no records. Give at least one.")
    columns = [name for name in records.column_names if name != ORIGIN]
    source = f"data.init_args.{split}"
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
            by_a_model = record.get("finished") is not None
            may_be_empty = by_a_model and fields.value(record, "output") == ""  # it had nothing to say
            if drop_empty and responses and not may_be_empty and fields.is_empty(record, "output"):
                continue
            found["prompt_text"].append(_prompt(template, fields, record, where, tokenizer))
            identity = fields.value(record, "id")
            found["id"].append(f"{split}-{index}" if identity is None else str(identity))
            empty = [""] if may_be_empty and not fields.value(record, "references") else None
            found["references"].append(empty or (fields.references(record, where) if with_references else []))
            outputs.append(fields.filled(record, "output", where) if responses and not may_be_empty else "")
            places.append(where)
            # what `predict` has noted: which prompts were read without BOS, which responses were cut off, and what ended the others
            prefixes.append([] if record.get("add_special_tokens") is False else prefix)
            ends.append([] if record.get("finished") is False else _noted_end(record, tokenizer) or end)
        encoded = encode(tokenizer, found["prompt_text"])
        prompts = [with_prefix(before, ids) for before, ids in zip(prefixes, encoded, strict=True)]
        for ids, where in zip(prompts, places, strict=True):
            if not ids:
                raise ValueError(
                    f"{where}: the prompt is empty, so there is nothing to answer. Fill it or remove the item."
                )
        answers: list[list[int]] = [[] for _ in outputs]
        if responses:
            answers = [ids + end for ids, end in zip(encode(tokenizer, outputs), ends, strict=True)]
        kept = [
            len(before) or int(ids[0] == tokenizer.bos_token_id) for before, ids in zip(prefixes, prompts, strict=True)
        ]
        return {**found, "prompt_ids": prompts, "response_ids": answers, "kept": kept}

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
    """Refuse an id that stands twice, where ids say what has been written already.

    Raises:
        ValueError: naming the id.
    """
    counts = Counter(ids)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(
            f"data.init_args.predict: {len(twice)} ids stand more than once, such as {twice[0]!r} ({counts[twice[0]]} times). "
            "`predict` "
            "goes by them where it continues a file. Give each item one of its own; data.init_args.fields.id names the column."
        )


def first_id_beyond(rows: datasets.Dataset, column: str, size: int) -> tuple[int, int] | None:
    """The first row of which ``column`` holds an id >= ``size``, and that id; None if there is none."""
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
    """What to tell the user whose data hold a token that the teacher does not have."""
    return (
        f"{where} holds the token {tokenizer.convert_ids_to_tokens(token)!r} ({token}), which the teacher's tokenizer lacks, so "
        "the teacher cannot score it. Remove it from the data, or choose another template or teacher."
    )


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids without special tokens of the tokenizer's own adding."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def tokenizer_content(tokenizer: Any) -> str:
    """Everything of a tokenizer that decides its ids, and nothing that a call changes."""
    if getattr(tokenizer, "is_fast", False):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content.pop("truncation", None)  # these two are what the last call asked for
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
    """Where rows with this fingerprint are kept: in the cache of ``datasets``."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "lit_distill" / f"{fingerprint}.arrow"


def digest(*parts: Any) -> str:
    """32 hex digits that stand for the parts, as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _require_output(fields: Fields, columns: list[str], source: str) -> None:
    if fields.has("output", columns):
        return
    turns = next((name for name in ("messages", "conversations") if name in columns), None)
    advice = (
        f"Conversations (`{turns}`) are not read as they are: write each prompt and its response as fields of a record."
        if turns
        else "Map `output` to one of them, or set data.init_args.responses to false for prompts alone."
    )
    raise ValueError(
        f"data.init_args.fields.output: there is no column {fields.columns['output']!r} for the responses in {source}. "
        f"The columns are {', '.join(columns)}. {advice}"
    )


def _noted_end(record: dict[str, Any], tokenizer: Any) -> list[int]:
    """The stop token that `predict` has noted, if the tokenizer knows it."""
    token = record.get("stop_token")
    ids = [] if token is None else [tokenizer.convert_tokens_to_ids(token)]
    return [] if ids in ([None], [tokenizer.unk_token_id]) else ids


def _prompt(template: Template, fields: Fields, record: dict[str, Any], where: str, tokenizer: Any) -> str:
    def field(name: str) -> str:
        return fields.filled(record, name, where) if name == "instruction" else fields.text(record, name, where)

    return template.render(field, tokenizer)
