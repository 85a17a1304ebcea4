"""Teachers known from a few tokens: normalised, exact where they say so, and unbiased if and only if they are drawn."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.functional.divergences import forward_kl
from lit_distill.functional.sparse import draw, top_k
from lit_distill.teachers.sparse import LEAST_TAIL, DrawnRows, TopKRows

ROWS, VOCABULARY = 6, 50
both_tails = pytest.mark.parametrize("tail", ["spread", "renormalize"])


@pytest.fixture
def logprobs() -> Tensor:
    return (2 * torch.randn(ROWS, VOCABULARY)).log_softmax(-1)


def top_k_rows(logprobs: Tensor, labels: Tensor, k: int, tail: str = "spread") -> TopKRows:
    exact = logprobs.gather(1, labels[:, None])[:, 0]
    return TopKRows(*top_k(logprobs, k), labels, exact, logprobs.shape[1], tail)


def token_of_rank(logprobs: Tensor, rank: int) -> Tensor:
    return logprobs.argsort(-1, descending=True)[:, rank]


def all_rows(rows) -> Tensor:
    return rows.logits(slice(0, ROWS))


@both_tails
@pytest.mark.parametrize("rank", [0, 20], ids=["label_inside", "label_outside"])
def test_probabilities_add_up_to_one(logprobs, tail, rank) -> None:
    logits = all_rows(top_k_rows(logprobs, token_of_rank(logprobs, rank), 8, tail))
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(ROWS))


def test_the_kept_tokens_are_exact_if_the_tail_is_spread(logprobs) -> None:
    logits = all_rows(top_k_rows(logprobs, token_of_rank(logprobs, 20), 8))
    ids, kept = logprobs.sort(-1, descending=True)[::-1]
    torch.testing.assert_close(logits.gather(1, ids[:, :8]), kept[:, :8])


def test_a_spread_tail_is_the_mean_of_the_probabilities_left(logprobs) -> None:
    label = token_of_rank(logprobs, 20)
    logits = all_rows(top_k_rows(logprobs, label, 8))
    for row in range(ROWS):
        others = sorted(range(VOCABULARY), key=lambda token: -logprobs[row, token].item())[8:]
        others.remove(label[row].item())
        torch.testing.assert_close(
            logits[row, others].exp(), logprobs[row, others].exp().mean().expand(len(others)), rtol=1e-4, atol=1e-7
        )


def test_a_label_among_the_kept_tokens_takes_nothing_from_the_tail(logprobs) -> None:
    logits = all_rows(top_k_rows(logprobs, token_of_rank(logprobs, 3), 8))
    others = logprobs.exp().sort(-1, descending=True).values[:, 8:].mean(-1)
    torch.testing.assert_close(logits.exp().amin(-1), others, rtol=1e-4, atol=1e-7)


def test_renormalized_tokens_are_the_softmax_over_the_k(logprobs) -> None:
    logits = all_rows(top_k_rows(logprobs, token_of_rank(logprobs, 0), 8, "renormalize"))
    kept = logprobs >= logprobs.sort(-1, descending=True).values[:, 7:8]
    torch.testing.assert_close(logits, logprobs.masked_fill(~kept, -math.inf).log_softmax(-1))


@both_tails
def test_all_tokens_give_the_exact_distribution(logprobs, tail) -> None:
    logits = all_rows(top_k_rows(logprobs, token_of_rank(logprobs, 20), VOCABULARY, tail))
    torch.testing.assert_close(logits, logprobs)


@pytest.mark.parametrize("rank", [0, VOCABULARY - 1], ids=["label_inside", "label_outside"])
def test_all_tokens_but_one_give_the_exact_distribution(logprobs, rank) -> None:
    logits = all_rows(top_k_rows(logprobs, token_of_rank(logprobs, rank), VOCABULARY - 1))
    torch.testing.assert_close(logits.exp(), logprobs.exp(), rtol=1e-4, atol=3e-7)


@pytest.mark.parametrize("rank", [0, 20, VOCABULARY - 1])
def test_the_logit_of_the_label_is_exact_if_the_tail_is_spread(logprobs, rank) -> None:
    labels = token_of_rank(logprobs, rank)
    rows = top_k_rows(logprobs, labels, 8)
    assert torch.equal(all_rows(rows).gather(1, labels[:, None])[:, 0], logprobs.gather(1, labels[:, None])[:, 0])


def test_the_logit_of_the_label_is_exact_if_the_others_are_rounded(logprobs) -> None:
    labels = token_of_rank(logprobs, 3)
    exact = logprobs.gather(1, labels[:, None])[:, 0]
    ids, kept = top_k(logprobs, 8)
    logits = all_rows(TopKRows(ids, kept.bfloat16(), labels, exact, VOCABULARY))
    assert torch.equal(logits.gather(1, labels[:, None])[:, 0], exact)


def test_the_tail_shares_what_the_exact_label_leaves_not_its_rounded_copy(logprobs) -> None:
    labels = token_of_rank(logprobs, 3)
    exact = logprobs.gather(1, labels[:, None])[:, 0]
    ids, kept = top_k(logprobs, 8)
    rounded = torch.where(ids == labels[:, None], kept.bfloat16().float(), kept)
    expected = all_rows(TopKRows(ids, kept, labels, exact, VOCABULARY))
    torch.testing.assert_close(all_rows(TopKRows(ids, rounded, labels, exact, VOCABULARY)), expected)


@both_tails
def test_log_probabilities_of_labels_are_those_recorded(logprobs, tail) -> None:
    labels = token_of_rank(logprobs, 20)
    recorded = top_k_rows(logprobs, labels, 8, tail).label_logprobs(labels, chunk_rows=2)
    assert torch.equal(recorded, logprobs.gather(1, labels[:, None])[:, 0])


def test_labels_that_were_not_recorded_are_refused(logprobs) -> None:
    labels = token_of_rank(logprobs, 20)
    with pytest.raises(AssertionError, match="not those"):
        top_k_rows(logprobs, labels, 8).label_logprobs(labels + 1)


@both_tails
def test_kept_tokens_that_add_up_to_more_than_one_give_finite_probabilities(tail) -> None:
    logprobs = (6 * torch.randn(200, VOCABULARY)).log_softmax(-1)
    labels = token_of_rank(logprobs, 20)
    ids, kept = top_k(logprobs, 16)
    rounded = kept.bfloat16()
    assert (rounded.float().exp().sum(-1) > 1).any()
    exact = logprobs.gather(1, labels[:, None])[:, 0]
    logits = TopKRows(ids, rounded, labels, exact, VOCABULARY, tail).logits(slice(0, 200))
    assert not logits.isnan().any()
    assert (logits > -math.inf).sum(-1).unique().item() == (VOCABULARY if tail == "spread" else 16)


def test_a_tail_without_mass_gets_the_least_mass() -> None:
    kept = torch.tensor([[0.0, -5.0]])
    logits = TopKRows(torch.tensor([[3, 1]]), kept, torch.tensor([3]), torch.tensor([0.0]), 6).logits(slice(0, 1))
    torch.testing.assert_close(logits[0, [0, 2, 4, 5]].exp(), torch.full((4,), LEAST_TAIL / 4))


def test_a_small_tail_is_not_lost_beside_a_token_close_to_one() -> None:
    top = -3e-6  # 1 - exp(top) in float32 would be wrong by up to 2 per cent
    rows = TopKRows(torch.tensor([[3]]), torch.tensor([[top]]), torch.tensor([3]), torch.tensor([top]), 4)
    expected = -math.expm1(top) / 3
    assert rows.logits(slice(0, 1))[0, 0].exp().item() == pytest.approx(expected, rel=1e-5)


def test_another_tail_is_an_error(logprobs) -> None:
    with pytest.raises(ValueError, match="tail: expected spread or renormalize, got 'zero'"):
        top_k_rows(logprobs, token_of_rank(logprobs, 0), 8, "zero")


def drawn_rows(logprobs: Tensor, num_draws: int) -> DrawnRows:
    draws = draw(logprobs, num_draws, torch.Generator().manual_seed(0))
    return DrawnRows(F.pad(draws.sizes.cumsum(0), (1, 0)), draws.ids, draws.counts, num_draws, logprobs.shape[1])


def compressed(form: str, logprobs: Tensor):
    return drawn_rows(logprobs, 9) if form == "draws" else top_k_rows(logprobs, logprobs.argmax(-1), 8, form)


every_form = pytest.mark.parametrize("form", ["spread", "renormalize", "draws"])


@every_form
@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 5), slice(4, None), slice(3, 3), slice(5, 99)])
def test_logits_of_a_chunk_are_its_part_of_all(logprobs, form, rows) -> None:
    teacher = compressed(form, logprobs)
    part = teacher.logits(rows)
    assert part.dtype == torch.float32
    assert part.shape == (len(range(ROWS)[rows]), VOCABULARY)
    assert torch.equal(part, all_rows(teacher)[rows])


@every_form
def test_logits_own_their_memory(logprobs, form) -> None:
    """An objective may overwrite them; an expanded row would change everywhere."""
    assert all_rows(compressed(form, logprobs)).is_contiguous()


def test_drawn_probabilities_are_the_frequencies() -> None:
    rows = DrawnRows(torch.tensor([0, 2, 3]), torch.tensor([1, 4, 0]), torch.tensor([3, 1, 4]), 4, 6)
    expected = torch.tensor([[0, 0.75, 0, 0, 0.25, 0], [1, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(rows.logits(slice(0, 2)).exp(), expected)


def test_draws_do_not_give_log_probabilities_of_labels(logprobs) -> None:
    with pytest.raises(ValueError, match=r"form: draws .* in the form hidden or topk"):
        drawn_rows(logprobs, 9).label_logprobs(torch.zeros(ROWS, dtype=torch.int64))


@pytest.fixture
def eight() -> tuple[Tensor, Tensor]:
    """Student logits and teacher log-probabilities ``[8]``."""
    return torch.randn(8), (1.5 * torch.randn(8)).log_softmax(-1)


def forward_kl_gradient(student: Tensor, teacher_logits: Tensor) -> Tensor:
    logits = student.expand_as(teacher_logits).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(forward_kl(logits, teacher_logits).sum(), logits)
    return gradient


def test_the_mean_gradient_over_all_draws_is_that_of_the_full_forward_kl(eight) -> None:
    student, teacher = eight
    pairs = list(product(range(8), repeat=2))
    distinct = [sorted(set(pair)) for pair in pairs]
    rows = DrawnRows(
        torch.tensor([0] + [len(ids) for ids in distinct]).cumsum(0),
        torch.tensor([token for ids in distinct for token in ids]),
        torch.tensor([pair.count(token) for pair, ids in zip(pairs, distinct, strict=True) for token in ids]),
        num_draws=2,
        vocabulary_size=8,
    )
    probabilities = torch.tensor([math.exp(teacher[a] + teacher[b]) for a, b in pairs])
    mean = (probabilities[:, None] * forward_kl_gradient(student, rows.logits(slice(0, 64)))).sum(0)
    torch.testing.assert_close(mean, student.softmax(-1) - teacher.exp(), rtol=0, atol=1e-6)


@both_tails
def test_the_gradient_of_the_most_probable_tokens_is_not_that_of_the_full_forward_kl(eight, tail) -> None:
    student, teacher = eight
    rows = top_k_rows(teacher[None], teacher.argmax(-1, keepdim=True), 2, tail)
    gradient = forward_kl_gradient(student, rows.logits(slice(0, 1)))[0]
    assert (gradient - (student.softmax(-1) - teacher.exp())).abs().max() > 1e-2
