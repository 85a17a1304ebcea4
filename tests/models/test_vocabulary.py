"""Which rows of two heads may be compared."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from lit_distill.models import common_vocabulary_size, stop_token_ids

TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "c"]


def test_heads_padded_to_different_sizes_share_the_real_tokens(make_tokenizer):
    assert common_vocabulary_size(make_tokenizer(TOKENS), make_tokenizer(TOKENS), 64, 128) == 6


def test_added_tokens_count_as_tokens(make_tokenizer):
    student, teacher = make_tokenizer(TOKENS), make_tokenizer(TOKENS)
    for tokenizer in (student, teacher):
        tokenizer.add_tokens(["<tool>"])
    assert common_vocabulary_size(student, teacher, 8, 8) == 7


@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_tokens_that_only_one_side_has_at_its_end_are_cut_off_with_a_warning(longer, make_tokenizer, caplog):
    tokenizers = {"student": make_tokenizer(TOKENS), "teacher": make_tokenizer(TOKENS)}
    tokenizers[longer].add_tokens(["<tool>", "<think>"])
    with caplog.at_level(logging.WARNING, logger="lit_distill"):
        assert common_vocabulary_size(tokenizers["student"], tokenizers["teacher"], 16, 16) == 6
    assert f"Only the {longer}'s tokenizer has the tokens 6 '<tool>', 7 '<think>'" in caplog.text


def test_an_id_that_means_different_tokens_is_an_error_that_shows_both(make_tokenizer):
    other = ["<unk>", "<s>", "</s>", "a", "c", "b"]
    with pytest.raises(
        ValueError, match=r"2 of the first 6 ids differ. 4 is 'b' in the student and 'c' in the teacher; 5 "
    ):
        common_vocabulary_size(make_tokenizer(TOKENS), make_tokenizer(other), 6, 6)


def test_a_hole_in_one_of_the_vocabularies_is_a_difference(make_tokenizer):
    teacher = make_tokenizer(TOKENS)
    tokens = teacher.get_vocab()
    del tokens["b"]
    teacher.get_vocab = lambda: tokens
    with pytest.raises(
        ValueError, match=r"1 of the first 6 ids differ. 4 is 'b' in the student and no token in the teacher"
    ):
        common_vocabulary_size(make_tokenizer(TOKENS), teacher, 6, 6)


@pytest.mark.parametrize(("rows", "role"), [((5, 6), "student"), ((6, 5), "teacher")])
def test_a_token_without_a_row_in_the_head_is_an_error(rows, role, make_tokenizer):
    with pytest.raises(
        ValueError, match=rf"^{role}: its tokenizer has ids up to 5 \('c'\), but its head has only 5 rows"
    ):
        common_vocabulary_size(make_tokenizer(TOKENS), make_tokenizer(TOKENS), *rows)


def test_different_ends_of_sequence_are_an_error_that_names_the_keys(make_tokenizer):
    teacher = make_tokenizer(TOKENS, eos="c")
    with pytest.raises(ValueError, match=r"'</s>' \(2\), the teacher's 'c' \(5\)[\s\S]*model\.student\.tokenizer"):
        common_vocabulary_size(make_tokenizer(TOKENS), teacher, 6, 6)
    with pytest.raises(ValueError, match=r"the reference's 'c' \(5\)[\s\S]*set model\.reference\.tokenizer"):
        common_vocabulary_size(make_tokenizer(TOKENS), teacher, 6, 6, "reference")


def test_other_special_tokens_may_differ_with_a_warning(make_tokenizer, caplog):
    student, teacher = make_tokenizer(TOKENS, pad="</s>"), make_tokenizer(TOKENS, pad="<unk>")
    with caplog.at_level(logging.WARNING, logger="lit_distill"):
        assert common_vocabulary_size(student, teacher, 6, 6) == 6
    assert "pad_token is '</s>', the teacher's is '<unk>'" in caplog.text


def test_equal_tokenizers_say_nothing(make_tokenizer, caplog):
    common_vocabulary_size(make_tokenizer(TOKENS), make_tokenizer(TOKENS), 6, 6)
    assert not caplog.records


@pytest.mark.parametrize(("configured", "stops"), [(None, (2,)), (2, (2,)), (5, (2, 5)), ([5, 2, 4], (2, 5, 4))])
def test_a_response_ends_at_any_stop_token_of_tokenizer_or_generation_config(configured, stops, make_tokenizer):
    generation_config = SimpleNamespace(eos_token_id=configured)
    assert stop_token_ids(make_tokenizer(TOKENS), generation_config) == stops


def test_without_any_stop_token_only_the_length_ends_a_response(make_tokenizer):
    tokenizer = make_tokenizer(TOKENS)
    tokenizer.eos_token = None
    assert stop_token_ids(tokenizer) == ()
