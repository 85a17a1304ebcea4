"""What stands around prompts and responses: as the chat template writes it, once, and the same when `predict` wrote the file."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GenerationConfig

from lit_distill.data import InstructionData, Records, Template
from lit_distill.data.columns import ColumnMapping
from lit_distill.data.special_tokens import adds_special_tokens, turn_end
from lit_distill.data.tokenize import tokenize_records
from lit_distill.generation import Prediction, prediction_records
from lit_distill.models import stop_token_ids
from lit_distill.types import Responses

GEMMA = (
    "{{ bos_token }}{% for m in messages %}<user>{{ m['content'] }}<assistant>\n{% endfor %}"
    "{% if add_generation_prompt %}<user>model\n{% endif %}"
)
"""As Gemma's: BOS first, and each turn ends with a token that is not EOS, and a line break."""
WITHOUT_BOS = GEMMA.removeprefix("{{ bos_token }}")
CHATML = (
    "{% for m in messages %}<user>{{ m['role'] }}\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<user>assistant\n{% endif %}"
)
WORDS_ONLY = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def rows_of(records, tokenizer, template="chat", **options):
    fields = ColumnMapping(options.pop("fields", None))
    read = Records(records).read("train") if isinstance(records, str) else records
    return tokenize_records(
        read, "train", tokenizer, template=Template(template), fields=fields, responses=True, **options
    )


def with_chat(tokenizer, chat_template):
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.mark.parametrize(
    ("chat_template", "end"),
    [(GEMMA, ["<assistant>"]), (CHATML, ["<eos>"]), (WORDS_ONLY, []), (None, []), ("{{ raise_exception('no') }}", [])],
)
def test_a_turn_ends_as_its_template_writes_it(bos_tokenizer, chat_template, end) -> None:
    tokenizer = with_chat(bos_tokenizer, chat_template)
    assert tokenizer.convert_ids_to_tokens(turn_end(tokenizer)) == end


def test_a_chat_response_ends_with_the_end_of_its_turn_and_generation_stops_there(bos_tokenizer, write_jsonl) -> None:
    tokenizer = with_chat(bos_tokenizer, GEMMA)
    row = rows_of(write_jsonl([{"instruction": "name a colour", "output": "red"}]), tokenizer)[0]
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "name a colour"}, {"role": "model", "content": "red"}], tokenize=False
    )
    assert whole.startswith("<bos><user>name a colour<assistant>\n")
    assert tokenizer.decode(row["response_ids"]) == "red<assistant>"
    assert row["response_ids"][-1] in stop_token_ids(tokenizer, GenerationConfig(eos_token_id=tokenizer.eos_token_id))
    plain = rows_of(write_jsonl([{"instruction": "name a colour", "output": "red"}]), tokenizer, "{instruction}")[0]
    assert tokenizer.decode(plain["response_ids"]) == "red<eos>"


@pytest.mark.parametrize("chat_template", [GEMMA, WITHOUT_BOS, CHATML])
@pytest.mark.parametrize("template", ["chat", "{instruction}", "<bos>{instruction}"])
def test_what_predict_wrote_is_read_as_the_same_ids(
    bos_tokenizer, write_jsonl, tmp_path, chat_template, template
) -> None:
    tokenizer = with_chat(bos_tokenizer, chat_template)
    questions = write_jsonl([{"instruction": f"name colour {n}", "output": "red"} for n in range(3)], "questions.jsonl")
    asked = rows_of(questions, tokenizer, template)
    loader = data_of(questions, tokenizer, template).predict_dataloader()
    (batch,) = loader
    end = turn_end(tokenizer)[-1] if template == "chat" else tokenizer.eos_token_id
    red = tokenizer("red", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*red, end]] * 2 + [red + red[:1]])  # the last one was cut off
    responses = Responses(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape))
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    records = prediction_records(batch, responses, texts, (tokenizer.eos_token_id, end), Prediction(), tokenizer, "0")
    assert [record["finished"] for record in records] == [True, True, False]
    answered = rows_of(
        write_jsonl(records, "answers.jsonl"),
        tokenizer,
        "{prompt}",
        fields={"output": "response", "instruction": "prompt"},
    )
    by_id = {row["id"]: row for row in asked}
    for row, response in zip(answered, ids.tolist(), strict=True):
        assert row["prompt_ids"] == by_id[row["id"]]["prompt_ids"]
        assert row["prompt_ids"].count(tokenizer.bos_token_id) <= 1
        assert row["response_ids"] == response


def data_of(path: str, tokenizer, template: str) -> InstructionData:
    data = InstructionData(Records(path), template=template, responses=True)
    data._tokenizer = lambda: tokenizer  # of a model that is not here
    data.setup("predict")
    return data


def test_a_prompt_that_begins_with_bos_is_not_given_another(bos_tokenizer, write_jsonl) -> None:
    row = rows_of(write_jsonl([{"instruction": "hi", "output": "red"}]), bos_tokenizer, "<bos>{instruction}")[0]
    assert bos_tokenizer.decode(row["prompt_ids"]) == "<bos>hi"


def test_which_prompts_were_given_bos_is_told_from_text_and_ids(bos_tokenizer) -> None:
    plain = bos_tokenizer("hi there", add_special_tokens=False)["input_ids"]
    bos = bos_tokenizer.bos_token_id
    assert adds_special_tokens(bos_tokenizer, "hi there", [bos, *plain])
    assert adds_special_tokens(bos_tokenizer, "hi there", [bos, *plain[1:]])  # cut to a limit
    assert not adds_special_tokens(bos_tokenizer, "hi there", plain)
    assert not adds_special_tokens(bos_tokenizer, "<bos>hi there", [bos, *plain])


def test_an_empty_response_that_a_model_finished_is_its_own_reference(tokenizer, write_jsonl) -> None:
    line = {"prompt": "say nothing", "response": "", "finished": True, "references": []}
    (row,) = rows_of(write_jsonl([line]), tokenizer, "{prompt}", fields={"output": "response", "instruction": "prompt"})
    assert row["response_ids"] == [tokenizer.eos_token_id]
    assert row["references"] == [""]


def test_records_without_a_response_are_refused_or_dropped_and_counted(tokenizer, write_jsonl, caplog) -> None:
    lines = [{"instruction": f"q{n}", "output": output} for n, output in enumerate(["red", "", "blue", "  ", None])]
    path = write_jsonl(lines)
    with pytest.raises(ValueError, match=r"line 2: the response is empty"):
        rows_of(path, tokenizer, "{instruction}")
    data = InstructionData(Records(path), template="{instruction}", empty_responses="drop", batch_size=2)
    data._tokenizer = lambda: tokenizer
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert data.num_items("train") == 2
    assert "3 records with an empty response dropped (empty_responses)" in caplog.text
    nothing = InstructionData(Records(write_jsonl([lines[1]])), template="{instruction}", empty_responses="drop")
    nothing._tokenizer = lambda: tokenizer
    with pytest.raises(ValueError, match=r"^train: all of the 1 records have an empty response"):
        nothing.setup("fit")


@pytest.mark.parametrize("part", ["instruction", "output"])
def test_a_token_that_the_teacher_lacks_is_found_with_its_item(tokenizer, write_jsonl, part: str) -> None:
    path = write_jsonl([{"id": f"n{n}", "instruction": "hi", "output": "red", part: "hi"} for n in range(3)])
    data = data_of(path, tokenizer, "{instruction}")
    data.check_token_ids(len(tokenizer))
    tokenizer.add_tokens(["<new>"])
    new = len(tokenizer) - 1
    lines = [json.dumps({"id": f"n{n}", "instruction": "hi", "output": "red"}) for n in range(2)]
    path = write_jsonl([*lines, {"id": "n2", "instruction": "hi", "output": "red", part: "a <new>"}])
    data = data_of(path, tokenizer, "{instruction}")
    data.check_token_ids(new + 1)
    what = "prompt" if part == "instruction" else "response"
    with pytest.raises(
        ValueError, match=rf"^predict: the {what} of the item 'n2' contains the token '<new>' \({new}\)"
    ):
        data.check_token_ids(new)


def test_a_column_that_nobody_reads_may_hold_anything(tokenizer, write_jsonl) -> None:
    odd = [1, "one", {"a": [1]}, [1, "x"], 10**30, None]
    path = write_jsonl([{"instruction": f"q{n}", "output": "red", "extra": value} for n, value in enumerate(odd)])
    data = InstructionData(Records(path), template="{instruction}")
    data._tokenizer = lambda: tokenizer
    data.setup("fit")
    assert data.num_items("train") == len(odd)
    with pytest.raises(ValueError, match=r"line 2: `extra` is text, but a number in .*line 1"):
        InstructionData(Records(path), template="{instruction} {extra}").read_split("train")


def test_a_field_that_one_split_lacks_is_named_with_the_split(tokenizer, write_jsonl) -> None:
    good, bad = write_jsonl([{"q": "hi", "a": "red"}]), write_jsonl([{"q": "hi", "b": "red"}], "validation.jsonl")
    data = InstructionData(
        Records(good), validation=Records(bad), fields={"instruction": "q", "output": "a"}, template="{instruction}"
    )
    data._tokenizer = lambda: tokenizer
    missing = r"fields\.output: there is no column 'a' in the validation records \(.*validation\.jsonl\).* q, b"
    with pytest.raises(ValueError, match=missing):
        data.setup("fit")


def test_a_template_of_ones_own_cannot_render_conversations(tokenizer, write_jsonl) -> None:
    path = write_jsonl([{"instruction": "x", "messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(
        ValueError, match=r"^template: '\{instruction\}' cannot render the conversations in .*train.jsonl"
    ):
        rows_of(path, tokenizer, "{instruction}")
