"""A teacher with its own prompt, and the student as its own teacher."""

from __future__ import annotations

import pytest
import torch
from loaded import LoadedOnes, frozen
from tiny import ASSETS

from lit_distill.data.synthetic.data import TEMPLATE
from lit_distill.models import CausalLM, ModelSpec, load_model, load_tokenizer
from lit_distill.teachers import CachedTeacher, MixedTeachers, Opening, PromptedTeacher, StudentTeacher
from lit_distill.types import Item, Sequences

SPEC = ModelSpec(str(ASSETS / "student"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SPEC, "student")


def text_of(tokenizer, *pairs: tuple[str, str], **fields: str) -> Sequences:
    from lit_distill.data.collate import pad_sequences

    ids = [tuple(tokenizer(part, add_special_tokens=False)["input_ids"] for part in pair) for pair in pairs]
    text = pad_sequences(ids, pad_id=0)
    items = tuple(Item(f"item-{n}", {"student_prompt": prompt, **fields}) for n, (prompt, _) in enumerate(pairs))
    return Sequences(text.input_ids, text.attention_mask, text.target_mask, items=items)


def prompted(tokenizer, template: str, **settings) -> PromptedTeacher:
    made = PromptedTeacher(LoadedOnes(frozen(1, 24)), template, **settings)
    made.open(Opening(tokenizer, SPEC, len(tokenizer), "cpu"), "teacher")
    made.loaded = FROZEN
    return made


torch.manual_seed(3)
FROZEN = None


@pytest.fixture(autouse=True, scope="module")
def teacher_of_the_vocabulary(tokenizer):
    from tiny import tiny_llama

    from lit_distill.teachers import FrozenTeacher

    global FROZEN  # noqa: PLW0603 - one model for all tests
    FROZEN = FrozenTeacher(CausalLM(tiny_llama(24, vocabulary=len(tokenizer))))
    return FROZEN


PAIRS = (("sort: 3 1 2", " 1 2 3"), ("reverse: a b", " b a"))


def test_the_same_prompt_changes_nothing(tokenizer) -> None:
    text = text_of(tokenizer, *PAIRS)
    own = prompted(tokenizer, "{student_prompt}")
    shown = own.prompted(text)
    assert torch.equal(shown.input_ids, text.input_ids)
    assert torch.equal(shown.target_mask, text.target_mask)
    every = slice(0, int(text.target_mask.sum()))
    assert torch.equal(own.rows(text).logits(every), FROZEN.rows(text).logits(every))


def test_the_responses_keep_their_ids_behind_another_prompt(tokenizer) -> None:
    text = text_of(tokenizer, *PAIRS, rule="be brief")
    shown = prompted(tokenizer, "{rule}. {student_prompt}").prompted(text)
    assert torch.equal(shown.input_ids[shown.target_mask], text.input_ids[text.target_mask])
    first = shown.input_ids[0][~shown.target_mask[0] & shown.attention_mask[0].bool()]
    assert tokenizer.decode(first) == "be brief. sort: 3 1 2"


def test_rows_are_those_of_the_teacher_on_its_own_text(tokenizer) -> None:
    text = text_of(tokenizer, *PAIRS, rule="be brief")
    rows = prompted(tokenizer, "{rule}. {student_prompt}").rows(text)
    seen = text_of(tokenizer, *[(f"be brief. {prompt}", response) for prompt, response in PAIRS])
    every = slice(0, int(text.target_mask.sum()))
    torch.testing.assert_close(rows.logits(every), FROZEN.rows(seen).logits(every))


def test_later_turns_and_what_lies_between_them_stay(tokenizer) -> None:
    text = text_of(tokenizer, PAIRS[0], rule="r")
    mask = text.target_mask.clone()
    places = mask[0].nonzero()[:, 0]
    mask[0, places[1]] = False
    shown = prompted(tokenizer, "{rule} {student_prompt}").prompted(
        Sequences(text.input_ids, text.attention_mask, mask, items=text.items)
    )
    assert int(shown.target_mask.sum()) == int(mask.sum())
    assert torch.equal(shown.input_ids[0, -len(places) :], text.input_ids[0, places[0] :])


def test_a_text_without_targets_is_left_alone(tokenizer) -> None:
    text = text_of(tokenizer, *PAIRS, rule="r").without_targets()
    assert not prompted(tokenizer, "{rule}").prompted(text).target_mask.any()


def test_a_prompt_that_is_too_long_is_never_cut(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"init_args\.max_prompt_length: .* 'item-0' has \d+ tokens, more than 4"):
        prompted(tokenizer, "{student_prompt}", max_prompt_length=4).rows(text_of(tokenizer, *PAIRS))


def test_a_text_beyond_the_context_is_named(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"'item-0' has \d+ tokens, and the teacher's context length is 64"):
        prompted(tokenizer, "{rule} {student_prompt}").rows(text_of(tokenizer, PAIRS[0], rule="1 2 3 " * 30))


def test_a_field_that_is_not_there_is_named(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"init_args\.template: the field 'rule' of the item 'item-0' is not known"):
        prompted(tokenizer, "{rule}").rows(text_of(tokenizer, *PAIRS))


def test_a_system_message_needs_a_chat_template(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"teacher\.init_args\.system: the tokenizer has no chat template"):
        prompted(tokenizer, "{student_prompt}", system="be brief")


@pytest.mark.parametrize("template", ["alpaca", "chat", "no field"])
def test_a_template_has_fields(template) -> None:
    with pytest.raises(ValueError, match=r"^template: "):
        PromptedTeacher(SPEC, template)


def test_it_asks_the_data_for_its_fields() -> None:
    made = PromptedTeacher(SPEC, "{rule} {student_prompt}", system="You know {solution}.")
    assert made.fields == {"rule", "student_prompt", "solution"}


def following(decay: float, every: int) -> tuple[StudentTeacher, CausalLM]:
    made = StudentTeacher(decay, every)
    student = CausalLM(load_model(SPEC, "student", torch.float32))
    made.open(Opening(None, SPEC, student.vocabulary_size, "cpu"), "teacher")
    made.load(None, student)
    return made, student


def weight(lm: CausalLM) -> torch.Tensor:
    return next(lm.parameters()).detach()


@pytest.mark.parametrize(("decay", "every"), [(0.0, 1), (0.5, 1), (0.9, 1), (0.0, 3), (0.5, 2)])
def test_the_copy_is_the_moving_average_of_the_students_weights(decay: float, every: int) -> None:
    made, student = following(decay, every)
    expected = weight(student).clone()
    for step in range(1, 8):
        with torch.no_grad():
            weight(student).add_(step)
        made.after_step(student, step)
        if step % every == 0:
            expected = decay * expected + (1 - decay) * weight(student)
        torch.testing.assert_close(weight(made._lm), expected)


def test_the_copy_is_restored_from_its_state() -> None:
    made, student = following(0.5, 1)
    with torch.no_grad():
        weight(student).add_(1)
    made.after_step(student, 1)
    other, _ = following(0.5, 1)
    other.load_state_dict(made.state_dict())
    assert torch.equal(weight(other._lm), weight(made._lm))


def test_the_templates_of_the_tasks_are_the_students_prompt() -> None:
    assert PromptedTeacher(SPEC, TEMPLATE).fields == {"instruction", "input"}


@pytest.mark.parametrize("inside", [False, True], ids=["a cache", "a mixture with a cache"])
def test_a_cache_cannot_be_prompted(inside) -> None:
    cached = CachedTeacher("no-such-folder")
    with pytest.raises(ValueError, match=r"^teacher: a cache has what .* Write it with a PromptedTeacher"):
        PromptedTeacher(MixedTeachers({"a": cached, "b": SPEC}) if inside else cached, "{rule}")
