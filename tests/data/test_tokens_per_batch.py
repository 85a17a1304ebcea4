"""Batches filled to a number of tokens: each item once, about as many tokens, the same for any number of ranks, resumable."""

from __future__ import annotations

import numpy as np
import pytest

from lit_distill.data.sampler import GlobalBatchSampler

LENGTHS = np.random.default_rng(0).lognormal(4.85, 0.7, 500).clip(32, 512).astype(np.int64)
TOKENS = 4096


def sampler(tokens: int | None = TOKENS, **options) -> GlobalBatchSampler:
    return GlobalBatchSampler(LENGTHS, 8, **{"seed": 1, "drop_last": True, "tokens_per_batch": tokens, **options})


def items(batches) -> list[list[int]]:
    return [batch.items for batch in batches]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_have_about_so_many_tokens_and_every_item_once(grouped: bool, drop_last: bool) -> None:
    loader = sampler(group_by_length=grouped, drop_last=drop_last)
    batches = items(loader)
    assert len(batches) == len(loader) == LENGTHS.sum() // TOKENS + (not drop_last)
    used = [item for batch in batches for item in batch]
    assert len(set(used)) == len(used)
    assert len(LENGTHS) - len(used) <= (40 if drop_last else 0)
    tokens = [int(LENGTHS[batch].sum()) for batch in batches]
    assert max(tokens) < TOKENS + 512
    assert min(sorted(tokens)[1:]) > TOKENS - 512
    if grouped:
        assert np.mean([LENGTHS[batch].std() for batch in batches]) < LENGTHS.std() / 4


@pytest.mark.parametrize("tokens", [5, 300, 512, 900])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_no_batch_is_empty_however_long_an_item_is(tokens: int, grouped: bool, drop_last: bool) -> None:
    loader = sampler(tokens, group_by_length=grouped, drop_last=drop_last)
    batches = items(loader)
    assert len(batches) == len(loader)
    assert all(batches)
    used = [item for batch in batches for item in batch]
    assert len(set(used)) == len(used)


def test_another_epoch_has_as_many_other_batches() -> None:
    loader = sampler()
    first = items(loader)
    loader.set_epoch(1)
    second = items(loader)
    assert len(first) == len(second)
    assert first != second


def test_ranks_share_the_batches_of_one_process() -> None:
    alone = items(sampler())
    shares = [items(sampler(rank=rank, world_size=3)) for rank in range(3)]
    for number, batch in enumerate(alone):
        assert sorted(batch) == sorted(item for share in shares for item in share[number])


@pytest.mark.parametrize("taken", [0, 1, 7, 16])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_resumed_epoch_goes_on_with_the_next_batch(taken: int, grouped: bool) -> None:
    whole = items(sampler(group_by_length=grouped))
    state = sampler(group_by_length=grouped).state_after(taken)
    resumed = sampler(group_by_length=grouped)
    resumed.go_on(state)
    assert items(resumed) == whole[taken:]
    again = sampler(group_by_length=grouped)
    again.go_on(resumed.state_after(min(taken + 2, len(whole))))
    assert items(again) == whole[taken + 2 :]


@pytest.mark.parametrize(("before", "after"), [(TOKENS, 2048), (2048, TOKENS), (TOKENS, None), (None, TOKENS)])
def test_with_another_size_the_rest_of_the_epoch_comes_once(before: int | None, after: int | None) -> None:
    first = sampler(before)
    done = items(first)[:5]
    resumed = sampler(after)
    resumed.go_on(first.state_after(5))
    rest = items(resumed)
    assert len(rest) == len(resumed) - resumed.start
    used = [item for batch in [*done, *rest] for item in batch]
    assert len(set(used)) == len(used)
    assert len(LENGTHS) - len(used) <= 60
