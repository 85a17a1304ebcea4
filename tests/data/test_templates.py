from __future__ import annotations

import re

import pytest

from lit_distill.data import Template
from lit_distill.data.columns import ColumnMapping
from lit_distill.data.templates import check_chat_template


def render(text: str, tokenizer=None, **record) -> str:
    fields = ColumnMapping()
    return Template(text).render(lambda name: fields.text(record, name, "here"), tokenizer)


def test_alpaca_with_input_is_the_prompt_of_minillm():
    assert render("alpaca", instruction="Sort.", input="b a") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nSort.\n\n### Input:\nb a\n\n### Response:\n"
    )


@pytest.mark.parametrize("record", [{"input": ""}, {"input": None}, {}])
def test_alpaca_without_input_is_the_short_form(record):
    assert render("alpaca", instruction="Sort.", **record) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSort.\n\n### Response:\n"
    )


def test_a_string_of_ones_own_is_filled_with_any_column():
    assert render("Q: {question} {{x}} ({n})\nA:", question="Why {not}?", n=3) == "Q: Why {not}? {x} (3)\nA:"


def test_values_are_never_evaluated():
    assert render("{instruction}", instruction="{instruction.__class__} {0}") == "{instruction.__class__} {0}"


@pytest.mark.parametrize("text", ["{instruction!r}", "{instruction:>9}", "{}", "{instruction", "a } b", "alpacca", ""])
def test_a_string_that_is_no_template_is_refused_by_its_key(text):
    with pytest.raises(ValueError, match=r"^template.*" + re.escape(repr(text))):
        Template(text)


@pytest.mark.parametrize("text", ["{question}", "{instruction.__class__}", "{instruction[0]}"])
def test_an_unknown_variable_is_an_error_that_lists_the_fields(text):
    with pytest.raises(ValueError, match=re.escape(text[1:-1]) + ".*instruction, input, output, topic"):
        Template(text).check(ColumnMapping().known(["instruction", "output", "topic"]))


def test_a_mapped_column_is_known_by_both_names():
    known = ColumnMapping({"instruction": "question"}).known(["question", "output"])
    Template("{question} {instruction} {input}").check(known)


def test_the_chat_template_gets_instruction_blank_line_and_input(chat_tokenizer):
    assert render("chat", chat_tokenizer, instruction="Sort.", input="b a") == "<user>Sort.\n\nb a<eos><assistant>"
    assert render("chat", chat_tokenizer, instruction="Sort.") == "<user>Sort.<eos><assistant>"


def test_a_tokenizer_without_chat_template_cannot_chat(tokenizer):
    with pytest.raises(ValueError, match=r"^template.*no chat template"):
        check_chat_template(Template("chat"), tokenizer)


def test_an_unknown_field_in_the_mapping_is_refused():
    with pytest.raises(ValueError, match=r"^fields: 'answer'.*instruction, input, output"):
        ColumnMapping({"answer": "output"})
