"""Packed integers against Python's own, the most probable tokens against a sort, and draws against their distribution."""

from __future__ import annotations

import math
import random

import pytest
import torch

from lit_distill.functional.sparse import _inverse_cdf, bits_for, draw, pack_bits, top_k, unpack_bits


def packed_by_hand(row: list[int], bits: int) -> list[int]:
    number = sum(value << (bits * place) for place, value in enumerate(row))
    return list(number.to_bytes(math.ceil(len(row) * bits / 8), "little"))


def random_values(n: int, k: int, bits: int) -> list[list[int]]:
    source = random.Random(f"{n} {k} {bits}")
    return [[source.choice([0, 2**bits - 1, source.randrange(2**bits)]) for _ in range(k)] for _ in range(n)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("vocabulary", "bits"), [(1, 1), (2, 1), (3, 2), (65536, 16), (65537, 17), (128256, 17)])
def test_bits_hold_every_token_of_the_vocabulary(vocabulary: int, bits: int) -> None:
    assert bits_for(vocabulary) == bits


@pytest.mark.parametrize("k", [1, 3, 7, 8, 9, 50, 64])
@pytest.mark.parametrize("bits", [1, 2, 5, 7, 8, 9, 16, 17, 18, 31, 32])
def test_packed_bytes_are_those_of_one_long_integer(bits: int, k: int) -> None:
    rows = random_values(5, k, bits)
    assert pack_bits(torch.tensor(rows), bits).tolist() == [packed_by_hand(row, bits) for row in rows]


@pytest.mark.parametrize("k", [1, 3, 7, 8, 9, 50, 64])
@pytest.mark.parametrize("bits", [1, 2, 5, 7, 8, 9, 16, 17, 18, 31, 32])
def test_unpacking_long_integers_gives_their_values(bits: int, k: int) -> None:
    rows = random_values(5, k, bits)
    packed = torch.tensor([packed_by_hand(row, bits) for row in rows], dtype=torch.uint8)
    assert unpack_bits(packed, k, bits).tolist() == rows


@pytest.mark.parametrize(("k", "bits", "size"), [(64, 17, 136), (50, 17, 107), (1, 17, 3), (12, 7, 11), (3, 8, 3)])
def test_a_packed_row_has_the_size_computed_by_hand(k: int, bits: int, size: int) -> None:
    packed = pack_bits(torch.zeros(2, k, dtype=torch.int64), bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, size)


def test_no_rows_can_be_packed_and_unpacked() -> None:
    packed = pack_bits(torch.zeros(0, 5, dtype=torch.int64), 17)
    assert packed.shape == (0, 11)
    assert unpack_bits(packed, 5, 17).shape == (0, 5)


@pytest.mark.parametrize("value", [-1, 128])
def test_a_value_that_the_bits_cannot_hold_is_an_error(value: int) -> None:
    with pytest.raises(ValueError, match="values: expected 0 to 127, which 7 bits hold"):
        pack_bits(torch.tensor([[3, value]]), 7)


def test_packed_rows_of_another_size_are_an_error() -> None:
    with pytest.raises(ValueError, match="64 values of 17 bits need 136 bytes a row, got 128"):
        unpack_bits(torch.zeros(2, 128, dtype=torch.uint8), 64, 17)


@pytest.mark.parametrize("bits", [0, 33])
def test_a_number_of_bits_out_of_range_is_an_error(bits: int) -> None:
    with pytest.raises(ValueError, match="bits: expected 1 to 32"):
        pack_bits(torch.zeros(1, 1, dtype=torch.int64), bits)


@pytest.mark.parametrize("k", [1, 5, 300])
def test_top_k_are_the_first_of_the_sorted_log_softmax(k: int) -> None:
    logits = 3 * torch.randn(6, 300)
    values, order = logits.double().log_softmax(-1).sort(-1, descending=True)
    ids, logprobs = top_k(logits, k)
    assert torch.equal(ids, order[:, :k])
    torch.testing.assert_close(logprobs, values[:, :k].float(), rtol=1e-6, atol=1e-6)


def test_log_probabilities_of_large_logits_keep_their_precision() -> None:
    logits = 1000 + torch.tensor([[0.0, -12.0, -13.0]])
    expected = logits.double().log_softmax(-1).float()
    torch.testing.assert_close(top_k(logits, 3)[1], expected, rtol=0, atol=1e-6)


def test_top_k_of_bfloat16_logits_are_float32() -> None:
    logits = torch.randn(4, 100).bfloat16()
    _, logprobs = top_k(logits, 100)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(4))


@pytest.mark.parametrize("k", [0, 9])
def test_more_tokens_than_the_vocabulary_has_are_an_error(k: int) -> None:
    with pytest.raises(ValueError, match="k: expected 1 to 8"):
        top_k(torch.randn(2, 8), k)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("compress", [lambda x: top_k(x, 2), lambda x: draw(x, 2, generator())], ids=["top_k", "draw"])
def test_logits_that_overflowed_are_an_error(compress, bad: float) -> None:
    logits = torch.randn(3, 8)
    logits[1, 4] = bad
    with pytest.raises(ValueError, match="logits: some are NaN"):
        compress(logits)


def test_counts_of_each_row_add_up_to_the_number_of_draws() -> None:
    draws = draw(torch.randn(40, 30), 17, generator())
    assert len(draws.ids) == len(draws.counts) == draws.sizes.sum()
    assert all(part.sum() == 17 for part in draws.counts.split(draws.sizes.tolist()))


def test_ids_of_each_row_are_distinct_and_ascending() -> None:
    draws = draw(torch.randn(40, 30), 17, generator())
    assert all((part.diff() > 0).all() for part in draws.ids.split(draws.sizes.tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frequencies_are_within_four_standard_deviations_of_the_softmax(dtype: torch.dtype) -> None:
    logits = (2 * torch.randn(40)).to(dtype)
    rows, num_draws = 2000, 50
    draws = draw(logits.expand(rows, -1), num_draws, generator())
    counts = torch.zeros(40, dtype=torch.float64).index_add_(0, draws.ids, draws.counts.double())
    p = logits.double().softmax(-1)
    total = rows * num_draws
    assert ((counts - total * p).abs() <= 4 * (total * p * (1 - p)).sqrt()).all()


def test_two_draws_of_a_row_are_independent() -> None:
    """The first token is drawn twice with its squared probability."""
    p, rows = 0.3, 20_000
    draws = draw(torch.tensor([0.3, 0.5, 0.2]).log().expand(rows, -1), 2, generator())
    twice = ((draws.ids == 0) & (draws.counts == 2)).sum().item()
    assert abs(twice - rows * p**2) <= 4 * math.sqrt(rows * p**2 * (1 - p**2))


def test_a_generator_of_the_same_seed_draws_the_same_tokens() -> None:
    logits = torch.randn(9, 50)
    first, second = (draw(logits, 20, generator(3)) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_draws_do_not_depend_on_how_rows_are_divided_into_calls() -> None:
    logits, source = torch.randn(9, 50), generator()
    parts = [draw(part, 7, source) for part in logits.split(4)]
    whole = draw(logits, 7, generator())
    assert all(
        torch.equal(torch.cat(column), all_) for column, all_ in zip(zip(*parts, strict=True), whole, strict=True)
    )


def test_draws_do_not_depend_on_the_rows_that_are_handled_together(monkeypatch) -> None:
    logits = torch.randn(9, 50)
    whole = draw(logits, 7, generator())
    monkeypatch.setattr("lit_distill.functional.sparse.BLOCK_BYTES", 2 * 8 * 50)
    assert all(map(torch.equal, draw(logits, 7, generator()), whole))


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.randn(2000, 12)
    logits[:, [0, 5, 10, 11]] = -math.inf
    assert not torch.isin(draw(logits, 50, generator()).ids, torch.tensor([0, 5, 10, 11])).any()


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (1 - 2**-53, 4)], ids=["lowest", "highest"])
def test_the_extreme_uniform_numbers_give_possible_tokens(uniform: float, token: int) -> None:
    logits = torch.randn(500, 7)
    logits[:, [0, 5, 6]] = -math.inf
    assert (_inverse_cdf(logits, torch.full((500, 1), uniform, dtype=torch.float64)) == token).all()


def test_draws_reach_every_part_of_a_vocabulary_of_256k() -> None:
    vocabulary, num_draws = 262_144, 100_000
    draws = draw(torch.zeros(1, vocabulary), num_draws, generator())
    per_part = torch.zeros(8, dtype=torch.int64).index_add_(0, draws.ids * 8 // vocabulary, draws.counts)
    assert ((per_part - num_draws / 8).abs() <= 4 * math.sqrt(num_draws * 1 / 8 * 7 / 8)).all()


def test_rare_tokens_of_a_large_vocabulary_are_drawn_one_by_one() -> None:
    """float32 numbers near 1 are 6e-8 apart: rounded sums would give one token the probability of eight neighbours."""
    num_rare, mass, num_draws = 262_144, 0.002, 1_000_000
    logits = torch.full((1, num_rare + 1), math.log(mass / num_rare))
    logits[0, 0] = math.log(1 - mass)
    draws = draw(logits, num_draws, generator())
    counts = draws.counts[draws.ids > 0]
    assert abs(counts.sum().item() - num_draws * mass) <= 4 * math.sqrt(num_draws * mass)
    expected_repeats = (num_draws * mass) ** 2 / (2 * num_rare)  # 7.6; 61 with eight neighbours as one
    assert (counts - 1).sum().item() <= expected_repeats + 4 * math.sqrt(expected_repeats)


def test_less_than_one_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_draws: expected at least 1, got 0"):
        draw(torch.randn(1, 8), 0, generator())
