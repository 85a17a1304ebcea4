"""A run that goes on with batches of another size reads the rest of the epoch, no item twice and none left out."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from lit_distill.data import CorpusOrder, GlobalBatchSampler


def sampler(count: int, batch_size: int, seed: int = 0, **settings) -> GlobalBatchSampler:
    lengths = np.random.default_rng(count).integers(1, 40, count)
    corpus = CorpusOrder(101, 3, seed=1)
    return GlobalBatchSampler(lengths, batch_size, seed=seed, drop_last=True, corpus=corpus, **settings)


def go_on(state: dict, count: int, batch_size: int, **settings) -> GlobalBatchSampler:
    resumed = sampler(count, batch_size, **settings)
    resumed.go_on(state)
    resumed.set_epoch(state["epoch"])  # as Lightning does
    return resumed


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize(("before", "after"), [(8, 4), (4, 8), (8, 6), (6, 8), (2, 16), (16, 1), (1, 5), (3, 48)])
def test_every_item_comes_once_whatever_the_sizes_and_the_place(before: int, after: int, group_by_length: bool) -> None:
    count = 48  # a multiple of all sizes but 5, of which an epoch leaves three over
    settings = {"group_by_length": group_by_length}
    first = sampler(count, before, **settings)
    first.set_epoch(3)
    batches = [batch.items for batch in first]
    for taken in range(1, len(batches)):
        resumed = go_on(first.state_after(taken), count, after, **settings)
        rest = [batch.items for batch in resumed]
        read = list(chain(*batches[:taken], *rest))
        assert len(set(read)) == len(read)
        assert count - count % after <= len(read) <= count
        assert resumed.start + len(rest) == len(resumed) == max(1, count // after)
        assert max(map(len, rest)) <= after
        assert max(map(len, rest)) - min(map(len, rest)) <= 1


@pytest.mark.parametrize(("before", "after"), [(8, 4), (4, 8), (8, 6), (1, 5), (3, 48)])
def test_from_any_place_of_such_an_epoch_a_run_goes_on_to_the_same_batches(before: int, after: int) -> None:
    first = sampler(50, before)
    list(first)
    for taken in range(1, len(first)):
        resumed = go_on(first.state_after(taken), 50, after)
        rest = list(resumed)
        for more in range(1, len(rest)):
            again = go_on(resumed.state_after(resumed.start + more), 50, after)
            assert list(again) == rest[more:]
            back = go_on(again.state_after(again.start), 50, after)
            assert list(back) == rest[more:]


def test_the_next_epoch_is_one_of_the_new_size() -> None:
    first, straight = sampler(48, 8), sampler(48, 6)
    list(first)
    resumed = go_on(first.state_after(2), 48, 6)
    list(resumed)
    for epoch in (1, 2):
        resumed.set_epoch(epoch)
        straight.set_epoch(epoch)
        assert [batch.items for batch in resumed] == [batch.items for batch in straight]


def test_another_seed_or_grouping_waits_for_the_next_epoch() -> None:
    first = sampler(48, 8, seed=0, group_by_length=False)
    whole = list(first)
    resumed = go_on(first.state_after(2), 48, 8, seed=5, group_by_length=True)
    assert list(resumed) == whole[2:]
    resumed.set_epoch(1)
    other = sampler(48, 8, seed=5, group_by_length=True)
    other.set_epoch(1)
    assert [batch.items for batch in resumed] == [batch.items for batch in other]


def test_corpus_rows_go_on_where_they_were() -> None:
    first = sampler(48, 8)
    used = [batch.corpus for batch in first][:2]
    resumed = go_on(first.state_after(2), 48, 4)
    used += [batch.corpus for batch in resumed]
    resumed.set_epoch(1)
    used += [batch.corpus for batch in resumed]
    order = CorpusOrder(101, 3, seed=1)
    assert used == [order.rows(index) for index in range(len(used))]


def test_all_ranks_share_every_batch() -> None:
    first = sampler(48, 8)
    state = first.state_after(2)
    alone = [batch.items for batch in go_on(state, 48, 6)]
    ranks = [[batch.items for batch in go_on(state, 48, 6, rank=rank, world_size=2)] for rank in range(2)]
    for batch, *shares in zip(alone, *ranks, strict=True):
        assert [batch[rank::2] for rank in range(2)] == shares
