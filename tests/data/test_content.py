"""What a run knows of its data: which tokens they are, and how many of them are learnt."""

from __future__ import annotations

import json

import pytest
from tiny import ASSETS
from transformers import AutoTokenizer

from lit_distill.data import InstructionData, Records

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def data_of(tmp_path, records: list[dict], **settings) -> InstructionData:
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    data = InstructionData(Records(str(file)), tokenizer=str(ASSETS / "student"), validation_size=0, **settings)
    data.setup("fit")
    return data


def records(answer: str = "5", count: int = 6) -> list[dict]:
    return [{"instruction": f"{row} plus 4", "output": answer if row == 3 else "7"} for row in range(count)]


def test_one_token_of_one_answer_makes_other_data(tmp_path) -> None:
    one, same, other = (data_of(tmp_path, records(answer)).content("train") for answer in ("5", "5", "6"))
    assert one == same != other
    assert {name: value for name, value in one.items() if name != "ids"} == {
        name: value for name, value in other.items() if name != "ids"
    }


def test_the_order_is_a_part_of_the_content(tmp_path) -> None:
    given = records()
    assert data_of(tmp_path, given).content("train") != data_of(tmp_path, given[::-1]).content("train")


def test_learnt_tokens_of_instructions_are_those_of_the_responses(tmp_path) -> None:
    data = data_of(tmp_path, records())
    learnt = sum(int(batch.sequences.target_mask.sum()) for batch in data.every_item("train"))
    assert data.num_targets("train") == learnt


@pytest.mark.parametrize("turns", ["all", "last"])
def test_learnt_tokens_of_conversations_are_those_of_all_their_answers(tmp_path, turns: str) -> None:
    chat = [{"role": role, "content": text} for role, text in [("user", "one"), ("assistant", "1 2 3")] * 3]
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    settings = {"chat_template": str(tmp_path / "chat.jinja"), "assistant_turns": turns}
    data = data_of(tmp_path, [{"messages": chat}] * 4, **settings)
    learnt = sum(int(batch.sequences.target_mask.sum()) for batch in data.every_item("train"))
    assert data.num_targets("train") == learnt > 0


def test_lists_that_are_empty_in_some_records_are_as_good_as_missing(tmp_path) -> None:
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}]
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    (tmp_path / "chat.jinja").write_text("{{ tools | length if tools else 0 }}" + TEMPLATE)
    given = [{"messages": chat, "tools": [tool] * (row % 2)} for row in range(4)]
    data = data_of(tmp_path, given, chat_template=str(tmp_path / "chat.jinja"))
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "student")
    texts = {tokenizer.decode(row)[:4].strip() for row in data._datasets["train"][0].rows["prompt_ids"]}
    assert {text[0] for text in texts} == {"0", "1"}
