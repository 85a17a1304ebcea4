from __future__ import annotations

from collections import Counter
from itertools import chain, zip_longest

import numpy as np
import pytest

from lit_distill.data import CorpusOrder, GlobalBatchSampler
from lit_distill.data.sampler import validation_mask

LENGTHS = np.random.default_rng(0).integers(1, 100, 1003)


def items(sampler) -> list[list[int]]:
    return [batch.items for batch in sampler]


def test_every_item_is_used_once_an_epoch():
    for shuffle in (True, False):
        assert Counter(chain(*items(GlobalBatchSampler(LENGTHS, 8, shuffle=shuffle)))) == Counter(range(1003))


def test_epochs_differ_and_the_same_seed_and_epoch_agree():
    sampler, other = GlobalBatchSampler(LENGTHS, 8, seed=3), GlobalBatchSampler(LENGTHS, 8, seed=3)
    first = items(sampler)
    sampler.set_epoch(1)
    second = items(sampler)
    assert first != second
    assert items(other) == first
    other.set_epoch(1)
    assert items(other) == second
    assert items(GlobalBatchSampler(LENGTHS, 8, seed=4)) != first


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("shuffle", [True, False])
def test_global_batches_are_the_same_for_any_number_of_ranks(world_size, shuffle):
    corpus = CorpusOrder(50, 6, seed=0)
    whole = list(GlobalBatchSampler(LENGTHS, 8, shuffle=shuffle, corpus=corpus))
    ranks = [
        list(GlobalBatchSampler(LENGTHS, 8, shuffle=shuffle, rank=rank, world_size=world_size, corpus=corpus))
        for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {len(whole)}
    for batch, *shares in zip(whole, *ranks, strict=True):
        for name in ("items", "corpus"):
            woven = chain(*zip_longest(*(getattr(share, name) for share in shares)))
            assert [index for index in woven if index is not None] == getattr(batch, name)


def test_a_share_may_be_empty_but_the_batch_is_there():
    sampler = GlobalBatchSampler([5, 6, 7], 2, shuffle=False, rank=1, world_size=2)
    assert items(sampler) == [[1], []]


def test_batches_of_like_length_need_far_less_padding_and_stay_random():
    def padding(sampler) -> int:
        return sum(max(LENGTHS[batch]) * len(batch) - sum(LENGTHS[batch]) for batch in items(sampler))

    grouped = GlobalBatchSampler(LENGTHS, 8)
    assert padding(grouped) < padding(GlobalBatchSampler(LENGTHS, 8, group_by_length=False)) / 5
    means = [LENGTHS[batch].mean() for batch in items(grouped)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3  # neither long nor short batches come first


def test_inside_a_batch_long_items_come_first():
    for batch in items(GlobalBatchSampler(LENGTHS, 8, group_by_length=False)):
        assert sorted(LENGTHS[batch], reverse=True) == LENGTHS[batch].tolist()


def test_evaluation_goes_from_long_to_short_every_time():
    order = list(chain(*items(GlobalBatchSampler(LENGTHS, 8, shuffle=False))))
    assert LENGTHS[order].tolist() == sorted(LENGTHS, reverse=True)


def test_drop_last_leaves_out_other_items_each_epoch():
    sampler = GlobalBatchSampler(LENGTHS, 8, drop_last=True)
    left_out = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = items(sampler)
        assert {len(batch) for batch in batches} == {8}
        assert len(batches) == len(sampler) == 125
        left_out.append(frozenset(range(1003)) - set(chain(*batches)))
    assert len(set(left_out)) == 4


@pytest.mark.parametrize(("count", "drop_last", "batches"), [(3, True, 1), (8, True, 1), (9, True, 1), (9, False, 2)])
def test_the_length_is_that_of_the_iteration(count, drop_last, batches):
    sampler = GlobalBatchSampler(list(range(1, count + 1)), 8, drop_last=drop_last)
    assert len(items(sampler)) == len(sampler) == batches


def test_skip_goes_on_in_the_middle_of_an_epoch_and_the_next_begins_at_its_start():
    corpus = CorpusOrder(30, 4, seed=1)
    straight = GlobalBatchSampler(LENGTHS, 8, corpus=corpus)
    straight.set_epoch(2)
    second = list(straight)
    straight.set_epoch(3)
    third = list(straight)

    resumed = GlobalBatchSampler(LENGTHS, 8, corpus=CorpusOrder(30, 4, seed=1))
    resumed.skip(100, epoch=2)
    resumed.set_epoch(2)
    assert len(resumed) == len(second)
    assert list(resumed) == second[100:]
    resumed.set_epoch(3)
    assert list(resumed) == third


def test_corpus_rows_are_all_used_before_any_comes_again_and_go_on_over_epochs():
    sampler = GlobalBatchSampler([1] * 6, 2, corpus=CorpusOrder(9, 4, seed=0))
    used = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        used += list(chain(*(batch.corpus for batch in sampler)))
    rounds = [used[at : at + 9] for at in range(0, 36, 9)]
    assert all(sorted(one) == list(range(9)) for one in rounds)
    assert len({tuple(one) for one in rounds}) == 4


def test_corpus_rows_are_a_function_of_the_index_alone():
    forward, backward = CorpusOrder(9, 4, seed=0), CorpusOrder(9, 4, seed=0)
    there = [forward.rows(index) for index in range(8)]
    assert [backward.rows(index) for index in reversed(range(8))] == there[::-1]


@pytest.mark.parametrize(("size", "number"), [(3, 3), (0.1, 10), (0.001, 1), (0.5, 50)])
def test_a_validation_split_has_the_size_asked_for_and_depends_on_the_seed(size, number):
    masks = [validation_mask(100, size, seed) for seed in (0, 0, 1)]
    assert [mask.sum() for mask in masks] == [number] * 3
    assert (masks[0] == masks[1]).all()
    assert (masks[0] != masks[2]).any()


def test_a_validation_split_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^validation_size: 10 was given, but train has only 10"):
        validation_mask(10, 10, seed=0)
