"""Records are recognised by their columns, files by their names; what is ambiguous is an error that shows the first record."""

from __future__ import annotations

import csv
import gzip
import json

import datasets
import pyarrow as pa
import pytest

from lit_distill.data import Records, Template
from lit_distill.data.columns import ColumnMapping
from lit_distill.data.files import ORIGIN
from lit_distill.data.formats import have_responses, recognise
from lit_distill.data.tokenize import tokenize_records

ROWS = [{"instruction": "one\ntwo", "output": 'a, "b"'}, {"instruction": "three", "output": "c"}]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def kind(*columns: str, template: str | None = None, responses: bool = True, **fields: str) -> str:
    chosen = None if template is None else Template(template)
    record = dict.fromkeys(columns, "what it holds")
    return recognise(columns, ColumnMapping(fields or None), chosen, responses, record, "the train records")


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (("messages",), "conversation"),
        (("conversations", "id", "system"), "conversation"),
        (("prompt", "messages", "prompt_id"), "conversation"),
        (("messages", "text"), "conversation"),
        (("prompt", "completion"), "completion"),
        (("instruction", "input", "output"), "instruction"),
        (("instruction", "output", "text"), "instruction"),
        (("text", "label"), "text"),
    ],
)
def test_columns_say_the_format(columns, found) -> None:
    assert kind(*columns) == found


def test_mapped_fields_and_a_template_decide() -> None:
    assert kind("question", "answer", instruction="question", output="answer") == "instruction"
    assert kind("chat", "instruction", "output", messages="chat") == "conversation"
    assert kind("prompt", "response", template="{prompt}", output="response") == "instruction"
    assert kind("prompt", responses=False) == "completion"


@pytest.mark.parametrize(
    ("record", "fields", "expected"),
    [
        ({"instruction": "a", "output": "b"}, {}, True),
        ({"prompt": "a", "completion": "b"}, {}, True),
        ({"question": "a", "answer": "b"}, {"output": "answer"}, True),
        ({"instruction": "a", "references": ["b"]}, {}, False),
        ({"messages": TALK}, {}, True),
        ({"chat": TALK}, {"messages": "chat"}, True),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {}, True),
        ({"messages": TALK[:1]}, {}, False),
    ],
)
def test_responses_are_found_by_column_or_by_the_last_turn(record, fields, expected) -> None:
    assert have_responses(datasets.Dataset.from_list([record]), ColumnMapping(fields)) is expected


def test_what_fits_nothing_or_two_formats_shows_the_first_record() -> None:
    with pytest.raises(
        ValueError,
        match=r"^fields: the train records have none .*columns are question, answer.*'question': 'what it holds'.*output: answer",
    ):
        kind("question", "answer")
    with pytest.raises(
        ValueError, match=r"as conversation or as instruction.*what it holds.*fields: \{messages: messages\}"
    ):
        kind("messages", "instruction", "output")


def rows_of(tokenizer, record: dict, write_jsonl, **options):
    columns = ColumnMapping()
    read = Records(write_jsonl([record])).read("train", columns.used(()))
    return tokenize_records(read, "train", tokenizer, template=None, fields=columns, responses=True, **options)


def test_completions_and_texts_are_rendered_as_they_are(bos_tokenizer, tokenizer, write_jsonl) -> None:
    (row,) = rows_of(bos_tokenizer, {"prompt": "the cat", "completion": " sat"}, write_jsonl)
    assert bos_tokenizer.decode(row["prompt_ids"]) == "<bos>the cat"
    assert bos_tokenizer.decode(row["response_ids"]) == " sat<eos>"
    (row,) = rows_of(bos_tokenizer, {"text": "the cat sat"}, write_jsonl)
    assert (bos_tokenizer.decode(row["prompt_ids"]), bos_tokenizer.decode(row["response_ids"])) == (
        "<bos>",
        "the cat sat<eos>",
    )
    (row,) = rows_of(tokenizer, {"text": "the cat sat"}, write_jsonl)  # without BOS the first token is given
    assert len(row["prompt_ids"]) == 1
    assert tokenizer.decode(row["prompt_ids"] + row["response_ids"]) == "the cat sat<eos>"


def test_what_was_recognised_is_said(tokenizer, write_jsonl) -> None:
    said: list[str] = []
    rows_of(tokenizer, {"prompt": "a", "completion": "b"}, write_jsonl, say=said.append)
    assert said == [
        "train: prompts with completions in the columns prompt, completion, rendered by the template '{prompt}'"
    ]


def write(path, rows) -> None:
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    plain = path.with_name(name)
    if name.endswith((".csv", ".tsv")):
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(str(plain), table.schema) as writer:
            writer.write_table(table)
    else:
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = plain.read_bytes()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zst":
        path.write_bytes(pa.compress(data, codec="zstd", asbytes=True))


@pytest.mark.parametrize(
    "name",
    ["a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.tsv", "a.csv.gz", "a.arrow", "a.arrow.zst"],
)
def test_files_of_every_kind_come_back_as_they_were_written(tmp_path, name) -> None:
    write(tmp_path / name, ROWS)
    read = Records(str(tmp_path / name)).read("train")
    assert read.remove_columns([ORIGIN]).to_list() == ROWS
    places = {"csv": ["line 2", "line 4"], "tsv": ["line 2", "line 4"], "arrow": ["row 1", "row 2"]}
    expected = places.get(name.split(".")[1], ["line 1", "line 2"])
    assert [origin.rpartition(", ")[2] for origin in read[ORIGIN]] == expected


def test_a_saved_folder_is_read(tmp_path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "many"))
    assert Records(str(tmp_path / "one")).read("train").to_list() == ROWS
    assert Records(str(tmp_path / "many"), split="test").read("train").to_list() == ROWS
    with pytest.raises(ValueError, match=r"^train\.split: .*many has no split 'train'. Its splits are test"):
        Records(str(tmp_path / "many")).read("train")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "x,y\n1,2\n1,2,3\n", "a.csv, line 3: 3 values, but the header names 2 columns: x, y"),
        ("a.csv", "x,x\n1,2\n", "a.csv, line 1: expected a header with a different name"),
        ("a.csv", 'x\n"a" b\n', "a.csv, line 2: not valid CSV"),
        ("a.jsonl.gz", "{}\n", "a.jsonl.gz, after line 0: cannot be decompressed"),
        ("a.arrow", "no", "a.arrow: not readable as Arrow"),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path, name, content, said) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        Records(str(tmp_path / name)).read("train")


def test_objects_keep_their_own_keys_and_lines_of_other_shapes_do_not_matter(write_jsonl) -> None:
    rows = [{"messages": TALK}, {"messages": [{**TALK[0], "extra": {"a": [1]}}]}, {"messages": TALK, "n": 1}]
    fields = ColumnMapping()
    read = Records(write_jsonl(rows)).read("train", fields.used(()))
    assert [fields.value(record, "messages") for record in read] == [row["messages"] for row in rows]


def test_only_the_first_records_are_taken_where_asked(write_jsonl, items) -> None:
    path = write_jsonl(items(9))
    assert Records(path, max_records=4).read("train").remove_columns([ORIGIN]).to_list() == items(9)[:4]
    first, other = (Records(path, max_records=n).read("train")._fingerprint for n in (4, 5))
    assert first != other
    with pytest.raises(ValueError, match="max_records: expected at least 1, got 0"):
        Records(path, max_records=0)


def test_columns_that_appear_or_change_their_type_far_down_are_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("lit_distill.data.files.ROWS_AT_ONCE", 2)
    rows = [{"a": "x"}, {"a": "y"}, {"a": "z", "n": 1}, {"a": "w", "n": 2.5}, {"a": None, "n": 3}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = Records(str(path)).read("train").remove_columns([ORIGIN])
    assert read.to_list() == [{"a": row.get("a"), "n": row.get("n")} for row in rows]


def test_the_chat_template_renders_prompts_and_the_column_system(chat_tokenizer, write_jsonl) -> None:
    said: list[str] = []
    for names in (("prompt", "completion"), ("instruction", "output")):
        read = Records(write_jsonl([{names[0]: "Sort.", names[1]: "a", "system": "Be brief."}])).read("train", None)
        columns, chat = ColumnMapping(None), Template("chat")
        rows = tokenize_records(
            read, "train", chat_tokenizer, template=chat, fields=columns, responses=True, say=said.append
        )
        assert rows[0]["prompt_text"] == "<system>Be brief.<eos><user>Sort.<eos><assistant>"
    assert said[0].startswith("train: prompts with completions in the columns prompt, completion, system")


def test_a_broken_archive_is_named(tmp_path) -> None:
    whole = gzip.compress(json.dumps(ROWS).encode())
    for name, content in (("cut.json.gz", whole[:-9]), ("plain.json.gz", b"[]"), ("cut.parquet.gz", whole[:-9])):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name):
            Records(str(path)).read("train", None)


def test_a_field_that_is_always_null_inside_lists_is_read(tmp_path) -> None:
    path = tmp_path / "talk.parquet"
    datasets.Dataset.from_list([{"messages": [{**turn, "tool_calls": None} for turn in TALK]}] * 3).to_parquet(path)
    assert len(Records(str(path)).read("train", None)) == 3
