from __future__ import annotations

import torch

from lit_distill.data.collate import Example, collate, padding_id

PAD = EOS = 0
ITEMS = [
    Example("a", [7, EOS, 8], [5, EOS], ["x", "y"], "A"),  # EOS inside a prompt is a token like any other
    Example("b", [9], [6, 6, 6, EOS], ["z"], "B"),
]


def test_sequences_are_padded_on_the_right_and_eos_is_a_target_though_it_equals_the_padding():
    sequences = collate(ITEMS, PAD, responses=True).sequences
    assert sequences.input_ids.tolist() == [[7, 0, 8, 5, 0], [9, 6, 6, 6, 0]]
    assert sequences.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert sequences.target_mask.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]


def test_padding_is_neither_attended_nor_a_target():
    sequences = collate([ITEMS[0], Example("c", [9], [EOS], ["z"], "C")], PAD, responses=True).sequences
    assert sequences.attention_mask.tolist()[1] == [1, 1, 0, 0, 0]
    assert sequences.target_mask.int().tolist()[1] == [0, 1, 0, 0, 0]
    assert sequences.input_ids.dtype == sequences.attention_mask.dtype == torch.int64


def test_prompts_are_padded_on_the_left():
    prompts = collate(ITEMS, PAD, responses=True).prompts
    assert prompts.input_ids.tolist() == [[7, 0, 8], [0, 0, 9]]
    assert prompts.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_texts_and_ids_ride_along():
    batch = collate(ITEMS, PAD, responses=True)
    assert (batch.ids, batch.prompt_texts, batch.references) == (("a", "b"), ("A", "B"), (("x", "y"), ("z",)))


def test_prompts_alone_have_no_sequences_and_no_references():
    batch = collate([Example("a", [7], [], [], "A")], PAD, responses=False)
    assert batch.sequences is None
    assert batch.references == ()
    assert batch.prompts.input_ids.tolist() == [[7]]


def test_every_item_has_its_own_references_though_another_has_none():
    items = [Example("a", [7], [], ["x", "y"], "A"), Example("b", [7], [], [], "B")]
    assert collate(items, PAD, responses=False).accepted == (("x", "y"), ())
    assert collate(items[1:], PAD, responses=False).accepted == ((),)


def test_a_rank_without_items_gets_one_row_that_counts_nowhere():
    batch = collate([], PAD, responses=True, corpus=[])
    assert len(batch) == 0
    assert batch.references == batch.prompt_texts == ()
    assert len(batch.prompts) == len(batch.sequences) == len(batch.corpus) == 1
    assert not batch.sequences.target_mask.any()
    assert not batch.corpus.target_mask.any()
    assert batch.sequences.attention_mask.all()  # a row without any token would be NaN in attention
    assert batch.prompts.attention_mask.all()


def test_every_corpus_token_is_a_target_but_the_first():
    corpus = collate(ITEMS, PAD, responses=True, corpus=[[1, 0, 2], [3, 4, 5]]).corpus
    assert corpus.input_ids.tolist() == [[1, 0, 2], [3, 4, 5]]
    assert corpus.target_mask.tolist() == [[False, True, True]] * 2
    assert corpus.attention_mask.all()


def test_a_tokenizer_without_padding_pads_with_eos(tokenizer, bos_tokenizer):
    assert padding_id(bos_tokenizer) == bos_tokenizer.eos_token_id
    tokenizer.pad_token_id = 2
    assert padding_id(tokenizer) == 2
