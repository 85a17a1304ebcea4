"""Records become rows of token ids once; later runs find them in the cache by content."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from datasets import Features, List, Value

from lit_distill.data.fields import Fields
from lit_distill.data.files import ORIGIN
from lit_distill.data.templates import Template, check_chat_template

VERSION = "2"  # part of every fingerprint: raise it when the rows change
FEATURES = Features(
    {
        "id": Value("string"),
        "prompt_ids": List(Value("int32")),  # with the special tokens that the tokenizer puts before a prompt
        "response_ids": List(Value("int32")),  # with EOS; empty where there are no responses
        "kept": Value("int32"),  # how many tokens at the start of the prompt a cut must spare (BOS)
        "references": List(Value("string")),
        "prompt_text": Value("string"),
    }
)


def tokenize_records(
    records: datasets.Dataset, split: str, tokenizer: Any, *, template: Template, fields: Fields, responses: bool
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

    Raises:
        ValueError: naming the place, for a missing field, an empty response, an unknown variable of the template.
    """
    if not len(records):
        raise ValueError(f"data.init_args.{split}: there are no records. Give at least one.")
    columns = [name for name in records.column_names if name != ORIGIN]
    fields.check(columns)
    check_chat_template(template, tokenizer)
    template.check(fields.known(columns))
    if responses:
        _require_output(fields, columns)
    with_references = responses or fields.has("references", columns) or fields.has("output", columns)
    fingerprint = digest(
        VERSION,
        records._fingerprint,
        split,
        tokenizer_content(tokenizer),
        template.text,
        sorted(fields.columns.items()),
        responses,
    )
    prefix = prompt_prefix(tokenizer, template)
    eos = required_eos(tokenizer)

    def rows(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {name: [] for name in ("id", "references", "prompt_text")}
        outputs, places, ends = [], [], []
        for position, index in enumerate(indices):
            record = {name: values[position] for name, values in batch.items()}
            where = record.get(ORIGIN) or f"{split}, row {index + 1}"
            found["prompt_text"].append(_prompt(template, fields, record, where, tokenizer))
            identity = fields.value(record, "id")
            found["id"].append(f"{split}-{index}" if identity is None else str(identity))
            found["references"].append(fields.references(record, where) if with_references else [])
            by_a_model = record.get("finished") is not None
            may_be_empty = by_a_model and fields.value(record, "output") == ""  # it had nothing to say
            outputs.append(fields.filled(record, "output", where) if responses and not may_be_empty else "")
            places.append(where)
            ends.append([] if record.get("finished") is False else [eos])  # `predict` says which responses were cut off
        prompts = [prefix + ids for ids in encode(tokenizer, found["prompt_text"])]
        for ids, where in zip(prompts, places, strict=True):
            if not ids:
                raise ValueError(
                    f"{where}: the prompt is empty, so there is nothing to answer. Fill it or remove the item."
                )
        answers: list[list[int]] = [[] for _ in outputs]
        if responses:
            answers = [ids + end for ids, end in zip(encode(tokenizer, outputs), ends, strict=True)]
        kept = [len(prefix) or int(ids[0] == tokenizer.bos_token_id) for ids in prompts]
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


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids without special tokens of the tokenizer's own adding."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def prompt_prefix(tokenizer: Any, template: Template) -> list[int]:
    """The special tokens that the tokenizer puts before a text, such as BOS; chat templates write their own."""
    if template.is_chat:
        return []
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    default = tokenizer("a")["input_ids"]
    for start in range(len(default) - len(plain) + 1):
        if default[start : start + len(plain)] == plain:
            return default[:start]
    return []


def required_eos(tokenizer: Any) -> int:
    """The id that ends a response.

    Raises:
        ValueError: if the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"data.init_args.tokenizer: {tokenizer.name_or_path!r} has no EOS token, so responses could never end. "
            "Set `eos_token` in its tokenizer_config.json."
        )
    return tokenizer.eos_token_id


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


def _require_output(fields: Fields, columns: list[str]) -> None:
    if not fields.has("output", columns):
        raise ValueError(
            f"data.init_args.fields.output: there is no column {fields.columns['output']!r} for the responses. "
            f"The columns are {', '.join(columns)}. Map `output` to one of them, or set "
            "data.init_args.responses to false for prompts alone."
        )


def _prompt(template: Template, fields: Fields, record: dict[str, Any], where: str, tokenizer: Any) -> str:
    def field(name: str) -> str:
        return fields.filled(record, name, where) if name == "instruction" else fields.text(record, name, where)

    return template.render(field, tokenizer)
