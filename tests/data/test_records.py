from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_distill.data import Records
from lit_distill.data.files import ORIGIN, ROWS_AT_ONCE

KEY = "train"
A, B = {"instruction": "one", "output": "1"}, {"instruction": "two", "output": "2"}


def read(path, **options) -> list[dict]:
    return Records(path, **options).read(KEY).remove_columns([ORIGIN]).to_list()


def fails(path, *words: str, **options) -> None:
    with pytest.raises(ValueError, match=".*".join(re.escape(word) for word in words)):
        Records(path, **options).read(KEY)


def test_a_jsonl_file_comes_back_as_it_was_written(write_jsonl):
    rows = [
        {"instruction": "Grüße, 世界", "output": 'a "quoted"\nline', "n": 3},
        {"instruction": "b", "output": "c", "n": 4},
    ]
    assert read(write_jsonl(rows)) == rows


def test_lines_may_have_different_keys(write_jsonl):
    assert read(write_jsonl([A, {**B, "references": ["2", "two"]}])) == [
        {**A, "references": None},
        {**B, "references": ["2", "two"]},
    ]


def test_a_key_that_first_appears_far_down_is_kept(write_jsonl):
    rows = read(write_jsonl([A] * (ROWS_AT_ONCE + 1) + [{**B, "references": ["2"]}]))
    assert rows[-1]["references"] == ["2"]
    assert len(rows) == ROWS_AT_ONCE + 2


def test_blank_lines_are_skipped_but_counted_in_messages(write_jsonl):
    path = write_jsonl([A, "", "   ", B, "{broken"])
    fails(path, path, "line 5")


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(A).encode() + b"\r\n")
    assert read(str(path)) == [A]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"instruction": "a", "output": ', "not valid JSON"),
        ("{'instruction': 'a'}", "not valid JSON"),
        ("[1, 2]", "must be a JSON object"),
        ("null", "not null"),
        ('"text"', "not text"),
        ('{"instruction": "a", "output": 5}', "`output` is a number"),
        ('{"instruction": "\\ud800", "output": "a"}', "cannot be stored"),
    ],
)
def test_a_broken_line_is_reported_with_file_line_and_reason(write_jsonl, line, reason):
    path = write_jsonl([A, B, line])
    fails(path, path, "line 3", reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"instruction": "caf\xe9"}', "not UTF-8 text: byte 0xe9"),
        ('{"a": "b"}'.encode("utf-16"), "not UTF-8"),
        (b"\x1f\x8b\x08\x00", "compressed"),
    ],
)
def test_a_file_that_is_no_utf8_text_is_reported_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(json.dumps(A).encode() + b"\n" + content if b"\xe9" in content else content)
    fails(str(path), str(path), "line 2" if b"\xe9" in content else "line 1", reason)


@pytest.mark.parametrize("content", ["", "\n\n"])
@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json"])
def test_an_empty_file_is_an_error(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    fails(str(path), str(path), "holds no records")


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"data": rows}])
def test_a_json_file_is_a_list_of_objects_or_has_one_under_data(tmp_path, wrap):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(wrap([A, B])))
    assert read(str(path)) == [A, B]


def test_a_json_file_that_is_jsonl_is_told_so(tmp_path):
    path = tmp_path / "lines.json"
    path.write_text(json.dumps(A) + "\n" + json.dumps(B))
    fails(str(path), str(path), "line 2", "*.jsonl")


def test_parquet_files_are_read_and_broken_ones_named(tmp_path):
    good, bad = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pylist([A, B]), good)
    bad.write_bytes(b"PAR1 not really")
    assert read(str(good)) == [A, B]
    fails(str(bad), str(bad), "Parquet")


def test_files_and_globs_are_joined_in_order(write_jsonl, tmp_path):
    write_jsonl([B], "part-2.jsonl")
    write_jsonl([A], "part-1.jsonl")
    last = write_jsonl([{"instruction": "three", "output": "3"}], "a.jsonl")
    outputs = [row["output"] for row in read([str(tmp_path / "part-*.jsonl"), last])]
    assert outputs == ["1", "2", "3"]


def test_files_whose_types_differ_name_both_places(write_jsonl):
    first, second = write_jsonl([A], "a.jsonl"), write_jsonl([{"instruction": "x", "output": ["y"]}], "b.jsonl")
    fails([first, second], second, "line 1", "a list", first, "line 1")


@pytest.mark.parametrize("path", ["missing.jsonl", "nowhere/*.jsonl", "../no such name"])
def test_a_missing_file_says_what_was_looked_for_and_where(path):
    fails(path, KEY + ".path", path, str(Path.cwd()))


def test_a_folder_and_a_file_of_another_kind_are_refused(tmp_path):
    other = tmp_path / "data.xlsx"
    other.write_text("a,b")
    fails(str(tmp_path), KEY + ".path", "is a folder")
    fails(str(other), KEY + ".path", ".jsonl")


def test_options_of_hub_datasets_are_refused_for_files(write_jsonl):
    fails(write_jsonl([A]), KEY + ".revision", "hub datasets only", revision="main")


def test_a_name_without_a_file_is_looked_up_at_the_hub(monkeypatch):
    asked = {}

    def load(path, **options):
        asked.update(options, path=path)
        return datasets.Dataset.from_list([A])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert Records("owner/name", split="test", config="en", revision="abc").read(KEY).to_list() == [A]
    assert asked == {"path": "owner/name", "name": "en", "split": "test", "revision": "abc"}


def test_a_failure_of_the_hub_names_the_key_and_the_dataset(monkeypatch):
    def load(path, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    fails("owner/name", KEY + ".path", "owner/name", "no network")


def test_the_fingerprint_is_that_of_the_content(write_jsonl):
    first = Records(write_jsonl([A, B], "a.jsonl")).read(KEY)._fingerprint
    again = Records(write_jsonl([A, B], "b.jsonl")).read(KEY)._fingerprint
    other = Records(write_jsonl([B, A], "a.jsonl")).read(KEY)._fingerprint
    assert first == again != other
