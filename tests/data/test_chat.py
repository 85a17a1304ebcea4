"""Which tokens of a conversation are learnt: every turn of the assistant with its end, as the template writes it, and no other."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from tokenizers import AddedToken

from lit_distill.data import InstructionData, Records
from lit_distill.data.columns import ColumnMapping
from lit_distill.data.tokenize import tokenize_records
from lit_distill.models import stop_token_ids

CHATML = (
    "{% if tools %}<|im_start|>tools {{ tools | map(attribute='name') | join(', ') }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.name }}{{ call.arguments }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNENDED = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THINKING = (  # as Qwen3: thoughts stay in the last turn only
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = {"pad_token": "<eos>", "bos_token": "<bos>"}
THREE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "the 2"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": " 3 "},
]


@pytest.fixture
def make_tokenizer(backend, wrapped):
    """A tokenizer whose padding is EOS, with the special tokens of chat templates."""

    def make(template: str):
        tokenizer = wrapped(backend, **SPECIAL_TOKENS, chat_template=template)
        names = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>")
        tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(name) for name in names]})
        return tokenizer

    return make


def rows_of(write_jsonl, tokenizer, *records, responses: bool = True, turns: str = "all", drop_empty=False, **fields):
    path = write_jsonl(list(records))
    columns = ColumnMapping(fields or None)
    read = Records(path).read("train", columns.used(()))
    return tokenize_records(
        read, "train", tokenizer, template=None, fields=columns, responses=responses, assistant_turns=turns,
        drop_empty=drop_empty,
    )  # fmt: skip


def learnt(tokenizer, row) -> list[str]:
    """The texts that are learnt, one for each span."""
    ids = row["prompt_ids"] + row["response_ids"]
    spans = row["targets"] or [len(row["prompt_ids"]), len(ids)]
    return [tokenizer.decode(ids[a:b]) for a, b in zip(spans[::2], spans[1::2], strict=True)]


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        (MARKED, ["1<|im_end|>", "the 2<|im_end|>", " 3 <|im_end|>"]),
        (UNENDED, ["1<|im_end|>", "the 2<|im_end|>", " 3 <|im_end|>"]),
        (CHATML, ["1<|im_end|>", "the 2<|im_end|>", " 3 <|im_end|>"]),
        (GEMMA, ["1<end_of_turn>", "the 2<end_of_turn>", "3<end_of_turn>"]),
    ],
    ids=["marks", "marks without the end", "no marks", "turn end is not EOS"],
)
def test_every_turn_of_the_assistant_is_learnt_with_its_end(make_tokenizer, write_jsonl, template, texts) -> None:
    tokenizer = make_tokenizer(template)
    (row,) = rows_of(write_jsonl, tokenizer, {"messages": THREE})
    assert learnt(tokenizer, row) == texts
    whole = tokenizer.apply_chat_template(THREE, tokenize=False)
    text = tokenizer.decode(row["prompt_ids"] + row["response_ids"])
    assert whole.startswith(text)
    assert not whole.removeprefix(text).strip()
    prompt = tokenizer.apply_chat_template(THREE[:-1], tokenize=False, add_generation_prompt=True)
    assert row["prompt_text"] == prompt
    assert row["prompt_ids"] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert row["references"] == [" 3 "]
    assert (row["num_prompt_tokens"], row["num_tokens"]) == (
        len(row["prompt_ids"]),
        len(row["prompt_ids"] + row["response_ids"]),
    )
    assert row["response_ids"][-1] in stop_token_ids(tokenizer)  # what ends a turn also ends a generated answer


def test_the_mask_of_a_batch_is_the_hand_written_one(make_tokenizer, write_jsonl) -> None:
    tokenizer = make_tokenizer(CHATML)
    data = InstructionData(
        Records(write_jsonl([{"messages": THREE[1:5]}])), batch_size=1, max_length=64, max_prompt_length=60
    )
    data._own_tokenizer = lambda: tokenizer
    data.setup("fit")
    (batch,) = data.train_dataloader()
    tokens = tokenizer.convert_ids_to_tokens(batch.sequences.input_ids[0])
    mask = batch.sequences.target_mask[0].tolist()
    starts = [i for i, (before, here) in enumerate(pairwise(mask), start=1) if here and not before]
    assert len(starts) == 2
    assert tokens[starts[0]] == "1"
    assert sum(mask) == len(tokenizer("1<|im_end|>the 2<|im_end|>", add_special_tokens=False)["input_ids"])
    assert (
        tokenizer.decode(batch.sequences.input_ids[0][batch.sequences.target_mask[0]]) == "1<|im_end|>the 2<|im_end|>"
    )


def test_sharegpt_and_system_columns_are_read_like_messages(make_tokenizer, write_jsonl) -> None:
    tokenizer = make_tokenizer(CHATML)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[m["role"]], "value": m["content"]} for m in THREE]
    (expected,) = rows_of(write_jsonl, tokenizer, {"messages": THREE, "id": "a"})
    for record in ({"conversations": sharegpt}, {"conversations": sharegpt[1:], "system": "Be brief."}):
        (row,) = rows_of(write_jsonl, tokenizer, {**record, "id": "a"})
        assert row == expected


def test_tools_are_rendered_and_calls_are_learnt(make_tokenizer, write_jsonl) -> None:
    tokenizer = make_tokenizer(CHATML)
    calls = [{"name": "add", "arguments": {"a": 1, "b": 2}}]
    messages = [
        {"role": "user", "content": "1 + 2"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    other = {"messages": THREE[1:3], "tools": json.dumps([{"name": "mul", "parameters": {"c": 1}}])}
    first, second = rows_of(write_jsonl, tokenizer, {"messages": messages, "tools": '[{"name": "add"}]'}, other)
    assert learnt(tokenizer, first) == ["<call>add{'a': 1, 'b': 2}</call><|im_end|>", "It is 3.<|im_end|>"]
    assert first["prompt_text"].startswith("<|im_start|>tools add<|im_end|>")
    assert second["prompt_text"].startswith("<|im_start|>tools mul<|im_end|>")


def test_thoughts_are_learnt_where_the_template_keeps_them(make_tokenizer, write_jsonl) -> None:
    tokenizer = make_tokenizer(THINKING)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>x</think>b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "<think>y</think>d"},
    ]
    (row,) = rows_of(write_jsonl, tokenizer, {"messages": messages})
    assert learnt(tokenizer, row) == ["b<|im_end|>", "<think>y</think>d<|im_end|>"]
    first, second = rows_of(write_jsonl, tokenizer, {"messages": messages}, turns="each")
    assert learnt(tokenizer, first) == ["<think>x</think>b<|im_end|>"]
    assert learnt(tokenizer, second) == ["<think>y</think>d<|im_end|>"]
    assert [first["id"], second["id"]] == ["train-0/1", "train-0/2"]


def test_turns_are_left_out_one_by_one_or_all_but_the_last(make_tokenizer, write_jsonl) -> None:
    tokenizer = make_tokenizer(CHATML)
    (last,) = rows_of(write_jsonl, tokenizer, {"messages": THREE}, turns="last")
    assert learnt(tokenizer, last) == [" 3 <|im_end|>"]
    assert last["targets"] == []
    some = [{**m, "train": False} if m["content"] == "1" else m for m in THREE]
    some[-1] = {**some[-1], "weight": 0}
    (row,) = rows_of(write_jsonl, tokenizer, {"messages": some})
    assert learnt(tokenizer, row) == ["the 2<|im_end|>"]
    assert row["response_ids"] == []


@pytest.mark.parametrize("wrong", [{"train": 0}, {"train": "false"}, {"weight": "0"}, {"weight": 0.5}])
def test_what_is_neither_learnt_nor_left_out_is_refused(make_tokenizer, write_jsonl, wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"message 2: {name} is .*; expected"):
        rows_of(write_jsonl, make_tokenizer(CHATML), {"messages": [THREE[0], {**THREE[1], **wrong}]})


def test_a_conversation_that_ends_with_the_user_is_a_prompt_as_it_is(make_tokenizer, write_jsonl) -> None:
    tokenizer = make_tokenizer(CHATML)
    (row,) = rows_of(write_jsonl, tokenizer, {"messages": THREE[:-1]}, responses=False)
    assert row["prompt_text"] == tokenizer.apply_chat_template(THREE[:-1], tokenize=False, add_generation_prompt=True)
    assert (row["references"], row["response_ids"], row["targets"]) == ([], [], [])
    (row,) = rows_of(write_jsonl, tokenizer, {"messages": THREE[:-1]})
    assert learnt(tokenizer, row) == ["1<|im_end|>", "the 2<|im_end|>"]
    each = rows_of(write_jsonl, tokenizer, {"messages": THREE[:-1]}, responses=False, turns="each")
    assert [prompt["references"] for prompt in each] == [["1"], ["the 2"], []]
    (prompt,) = rows_of(write_jsonl, tokenizer, {"messages": THREE}, responses=False)
    assert (prompt["prompt_ids"], prompt["references"]) == (row["prompt_ids"], [" 3 "])


def test_prompts_and_completions_may_be_messages(make_tokenizer, write_jsonl) -> None:
    tokenizer = make_tokenizer(CHATML)
    (row,) = rows_of(write_jsonl, tokenizer, {"prompt": THREE[:-1], "completion": THREE[-1:]})
    assert learnt(tokenizer, row) == [" 3 <|im_end|>"]


def test_an_answer_that_says_nothing_is_an_error_unless_it_is_not_learnt_or_dropped(
    make_tokenizer, write_jsonl
) -> None:
    tokenizer = make_tokenizer(CHATML)
    silent = [*THREE[:4], {"role": "assistant", "content": " "}, *THREE[5:]]
    with pytest.raises(
        ValueError, match=r"line 1: message 5 \(assistant\) is empty\. Fill it, .*empty_responses: drop"
    ):
        rows_of(write_jsonl, tokenizer, {"messages": silent})
    assert len(rows_of(write_jsonl, tokenizer, {"messages": silent}, turns="last")) == 1
    assert len(rows_of(write_jsonl, tokenizer, {"messages": silent}, responses=False)) == 1
    kept = rows_of(write_jsonl, tokenizer, {"messages": silent}, {"messages": THREE}, drop_empty=True)
    assert learnt(tokenizer, kept[0])[1] == "the 2<|im_end|>"
    assert len(kept) == 1
    untrained = [*THREE[:4], {"role": "assistant", "content": "", "train": False}, *THREE[5:]]
    calling = [*THREE[:4], {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, *THREE[5:]]
    assert len(rows_of(write_jsonl, tokenizer, {"messages": untrained}, {"messages": calling})) == 2


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (CHATML, [], r"line 1: the conversation is missing or empty"),
        (CHATML, THREE[:2], "line 1: the conversation has no turn of the assistant that is learnt"),
        (CHATML, [{"role": "bot", "content": "x"}], "line 1: message 1 has the role 'bot'. Known roles: user, human"),
        (CHATML, [{"role": "user"}], r"line 1: message 1 \(user\) has no content"),
        (CHATML, [{"role": "user", "content": [{"type": "image"}]}], "parts that are not text"),
        (
            CHATML + "{{ raise_exception('no ' + messages[0].role) }}",
            THREE,
            "line 1: the chat template refuses .*no system",
        ),
        (CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}"), THREE, "shows nothing of message 3"),
        (
            CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
            THREE,
            "does not reproduce the text before",
        ),
    ],
    ids=["empty", "no answer", "role", "no content", "image", "refused", "hidden", "other prompt"],
)
def test_what_cannot_be_learnt_is_an_error_with_its_place(
    make_tokenizer, write_jsonl, template, messages, said
) -> None:
    with pytest.raises(ValueError, match=said):
        rows_of(write_jsonl, make_tokenizer(template), {"messages": messages})
