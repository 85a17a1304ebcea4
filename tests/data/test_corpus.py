from __future__ import annotations

import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_distill.data import Corpus
from lit_distill.data import corpus as corpus_module

DOCUMENTS = ["the cat sat\non the mat", "name a colour", "red green blue"]


def stream(tokenizer, documents=DOCUMENTS) -> list[int]:
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
    return ids


def packed(path, tokenizer, length=4, **options) -> list[list[int]]:
    return Corpus(str(path), length=length, **options).rows(tokenizer)["input_ids"][:]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n" + "\n\n \n".join(DOCUMENTS) + "\n")
    return path


def test_text_is_packed_to_rows_of_one_length_with_eos_between_documents(text, tokenizer):
    ids = stream(tokenizer)
    expected = [ids[at : at + 4] for at in range(0, len(ids) - 3, 4)]
    assert packed(text, tokenizer) == expected


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_documents_may_be_a_field_of_records(tmp_path, text, tokenizer, kind):
    rows = [{"body": document} for document in DOCUMENTS]
    path = tmp_path / f"corpus.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(json.dumps(row) for row in rows))
    assert packed(path, tokenizer, text_field="body") == packed(text, tokenizer)


def test_a_corpus_longer_than_one_portion_is_packed_alike(text, tokenizer, monkeypatch):
    whole = packed(text, tokenizer, length=3)
    monkeypatch.setattr(corpus_module, "DOCUMENTS_AT_ONCE", 1)
    text.write_text(text.read_text() + "\n\n")  # other bytes, the same documents: no cache
    assert packed(text, tokenizer, length=3) == whole


def test_the_tail_is_dropped_and_its_count_reported(text, tokenizer, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(corpus_module, "rank_zero_info", said.append)
    count, tail = divmod(len(stream(tokenizer)), 5)
    assert len(packed(text, tokenizer, length=5)) == count
    assert any(f"packed {count} rows of 5 tokens; {tail} tokens at the end" in line for line in said)


def test_a_second_run_does_not_tokenise_again(text, tokenizer, monkeypatch):
    first = packed(text, tokenizer)
    monkeypatch.setattr(corpus_module, "encode", None)
    assert packed(text, tokenizer) == first


def test_a_hub_dataset_is_read_by_its_text_field(text, tokenizer, monkeypatch):
    hub = datasets.Dataset.from_list([{"text": document} for document in DOCUMENTS])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: hub)
    assert packed("owner/name", tokenizer) == packed(text, tokenizer)


def test_too_little_text_is_an_error_that_leaves_nothing_in_the_cache(text, tokenizer, data_cache):
    expected = f"path: {text} has {len(stream(tokenizer))} tokens, too few for one row of 500."
    with pytest.raises(ValueError, match=re.escape(f"{expected} Give more text, or a smaller length")):
        packed(text, tokenizer, length=500)
    assert not [path for path in data_cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.txt", " \n\n"), ("a.jsonl", '{"text": ""}\n')])
def test_a_file_without_text_is_named_and_not_the_length_of_rows(tmp_path, tokenizer, name, content) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"path: {path} is empty: there is no text")):
        packed(path, tokenizer)


def test_a_record_without_text_is_reported_with_file_and_line(write_jsonl, tokenizer):
    path = write_jsonl([{"text": "the cat"}, {"title": "none"}])
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: the field `text` is missing")):
        packed(path, tokenizer)


def test_text_that_is_not_utf8_is_reported_with_file_and_line(tmp_path, tokenizer):
    path = tmp_path / "latin.txt"
    path.write_bytes("fine\ncafé".encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: not UTF-8")):
        packed(path, tokenizer)


@pytest.mark.parametrize(("option", "value"), [("length", 1), ("batch_size", 0)])
def test_sizes_that_cannot_be_name_their_key(option, value):
    with pytest.raises(ValueError, match=rf"^{option}"):
        Corpus("text.txt", **{option: value})
