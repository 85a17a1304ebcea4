from __future__ import annotations

import datasets
import pytest

from lit_distill.data import Records, Template
from lit_distill.data.columns import ColumnMapping
from lit_distill.data.encoding import tokenizer_content
from lit_distill.data.tokenize import tokenize_records

GOOD = {"instruction": "name a colour", "output": "red"}


def tokenized(source, tokenizer, *, template="{instruction}", fields=None, responses=True, split="train"):
    records = Records(source).read("train") if isinstance(source, str) else datasets.Dataset.from_list(source)
    return tokenize_records(
        records, split, tokenizer, template=Template(template), fields=ColumnMapping(fields), responses=responses
    )


@pytest.fixture
def count_calls(monkeypatch):
    """How many texts a tokenizer has been given, counted around its class."""

    def install(tokenizer) -> list[int]:
        calls: list[int] = []
        kind = type(tokenizer)
        call = kind.__call__

        def counted(self, text, *args, **options):
            if isinstance(text, list):
                calls.append(len(text))
            return call(self, text, *args, **options)

        monkeypatch.setattr(kind, "__call__", counted)
        return calls

    return install


def test_prompt_and_response_are_tokenised_apart_and_end_with_eos(tokenizer):
    row = tokenized([GOOD], tokenizer)[0]
    assert tokenizer.decode(row["prompt_ids"]) == "name a colour" == row["prompt_text"]
    assert tokenizer.decode(row["response_ids"]) == "red<eos>"
    assert row["prompt_ids"] == tokenizer("name a colour")["input_ids"]
    assert row["response_ids"] == [*tokenizer("red")["input_ids"], tokenizer.eos_token_id]


def test_bos_comes_before_the_prompt_if_the_tokenizer_puts_it_there_and_eos_only_behind_the_response(bos_tokenizer):
    row = tokenized([GOOD], bos_tokenizer)[0]
    assert bos_tokenizer.decode(row["prompt_ids"]) == "<bos>name a colour"
    assert bos_tokenizer.decode(row["response_ids"]) == "red<eos>"
    assert row["num_prefix_tokens"] == 1


def test_the_chat_template_is_tokenised_with_its_special_tokens_once(chat_tokenizer):
    row = tokenized([GOOD], chat_tokenizer, template="chat")[0]
    tokens = chat_tokenizer.convert_ids_to_tokens(row["prompt_ids"])
    assert (tokens[0], tokens[-2:]) == ("<user>", ["<eos>", "<assistant>"])
    assert chat_tokenizer.decode(row["prompt_ids"]) == "<user>name a colour<eos><assistant>"


def test_fields_are_mapped_to_the_users_columns(tokenizer):
    rows = tokenized(
        [{"q": "who", "ctx": "cat", "a": "me", "uid": 17, "accepted": ["me", "I"]}],
        tokenizer,
        template="{instruction}/{input}/{q}",
        fields={"instruction": "q", "input": "ctx", "output": "a", "id": "uid", "references": "accepted"},
    )
    assert (rows[0]["id"], rows[0]["references"], rows[0]["prompt_text"]) == ("17", ["me", "I"], "who/cat/who")


def test_defaults_are_a_numbered_id_and_the_output_as_reference(tokenizer):
    rows = tokenized([GOOD, {**GOOD, "output": "blue"}], tokenizer, split="test")
    assert rows["id"][:] == ["test-0", "test-1"]
    assert rows["references"][:] == [["red"], ["blue"]]


def test_prompts_alone_need_no_output(tokenizer):
    row = tokenized([{"instruction": "go"}], tokenizer, responses=False)[0]
    assert (row["response_ids"], row["references"]) == ([], [])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"instruction": "x", "output": " \n"}, "response is empty"),
        ({"instruction": "x"}, "`output` is missing"),
        ({"output": "x"}, "`instruction` is missing"),
        ({"instruction": "", "output": "x"}, "instruction is empty"),
        ({"instruction": "x", "output": "y", "references": ["y", ""]}, "`references` must be a list of texts"),
    ],
)
def test_a_bad_item_is_reported_with_file_line_and_what_to_do(write_jsonl, tokenizer, bad, reason):
    path = write_jsonl([GOOD, "", bad])
    with pytest.raises(ValueError, match=rf"{path}, line 3: .*{reason}"):
        tokenized(path, tokenizer)


def test_a_bad_item_without_a_file_is_reported_by_its_row(tokenizer):
    with pytest.raises(ValueError, match=r"test, row 2: the response is empty.*remove the item"):
        tokenized([GOOD, {**GOOD, "output": ""}], tokenizer, split="test")


def test_a_missing_output_column_names_the_columns_there_are(tokenizer):
    with pytest.raises(ValueError, match=r"fields\.output.*'output'.*columns are instruction, answer"):
        tokenized([{"instruction": "x", "answer": "y"}], tokenizer)


def test_a_mapped_column_that_is_not_there_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"fields\.input: there is no column 'ctx'"):
        tokenized([GOOD], tokenizer, fields={"input": "ctx"})


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        tokenized([GOOD], tokenizer)


def test_a_second_run_finds_the_rows_in_the_cache(write_jsonl, tokenizer, count_calls):
    path = write_jsonl([GOOD] * 3)
    calls = count_calls(tokenizer)
    first = tokenized(path, tokenizer).to_list()
    assert calls == [3, 3]
    tokenizer(
        ["padded", "to one length here"], padding=True, truncation=True, max_length=4
    )  # state that must not matter
    calls.clear()
    assert tokenized(path, tokenizer).to_list() == first
    assert calls == []


@pytest.mark.parametrize("change", ["content", "template", "fields", "tokenizer", "responses", "split"])
def test_whatever_changes_the_rows_misses_the_cache(write_jsonl, tokenizer, bos_tokenizer, count_calls, change):
    path = write_jsonl([{**GOOD, "context": "c"}])
    calls = count_calls(tokenizer)
    tokenized(path, tokenizer)
    calls.clear()
    if change == "content":
        write_jsonl([{**GOOD, "context": "d"}])
    tokenized(
        path,
        bos_tokenizer if change == "tokenizer" else tokenizer,
        template="{instruction}:" if change == "template" else "{instruction}",
        fields={"input": "context"} if change == "fields" else None,
        responses=change != "responses",
        split="test" if change == "split" else "train",
    )
    assert calls


def test_a_tokenizer_is_known_by_its_content_not_its_object(backend, tokenizer, chat_tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert tokenizer_content(again) == tokenizer_content(tokenizer) != tokenizer_content(chat_tokenizer)
