"""MiniLLM's gradient on a language small enough to enumerate: 3 tokens, at most 3 per text, logits per prefix."""

from __future__ import annotations

import itertools

import pytest
import torch

from lit_distill.functional import clipped_surrogate, decision_weights, importance_weights, reverse_kl, reward_to_go

EOS, VOCABULARY, LENGTH = 0, 3, 3


def enumerate_texts():
    for text in itertools.product(range(VOCABULARY), repeat=LENGTH):
        if EOS not in text:
            yield text
    for length in range(LENGTH):
        for words in itertools.product(range(1, VOCABULARY), repeat=length):
            yield (*words, EOS)


TEXTS = sorted(set(enumerate_texts()))
PREFIXES = {prefix: row for row, prefix in enumerate(sorted({text[:t] for text in TEXTS for t in range(len(text))}))}
ROWS = torch.tensor([[PREFIXES[text[:t]] if t < len(text) else 0 for t in range(LENGTH)] for text in TEXTS])
TOKENS = torch.tensor([[*text, *[0] * (LENGTH - len(text))] for text in TEXTS])
MASK = torch.tensor([[t < len(text) for t in range(LENGTH)] for text in TEXTS])


@pytest.fixture
def tables():
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(len(PREFIXES), 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher


def token_logprobs(table):
    return table.log_softmax(-1)[ROWS].gather(-1, TOKENS[..., None])[..., 0]


def text_logprobs(table):
    return (token_logprobs(table) * MASK).sum(1)


def exact_gradient(student, teacher):
    log_q = text_logprobs(student)
    return torch.autograd.grad((log_q.exp() * (log_q - text_logprobs(teacher))).sum(), student)[0]


def expected_gradient(student, teacher, alpha, kind, *, include_current=False, parts=("long", "single")):
    """Mean over every text, under the sampler's law, of the gradient that one sampled text gives."""
    log_q, log_p = token_logprobs(student), token_logprobs(teacher)
    with torch.no_grad():
        sampler = (alpha * log_p.exp() + (1 - alpha) * log_q.exp()).where(MASK, torch.ones(())).prod(1)
    weights = decision_weights(log_q, log_p, alpha, MASK, kind)
    advantages = reward_to_go(
        (log_p - log_q) * weights.rewards, MASK, include_current=include_current, length_normalize=False
    )
    long = clipped_surrogate(log_q, log_q.detach(), advantages, weights.long, None) * MASK
    single = reverse_kl(student, teacher)[ROWS] * weights.single * MASK
    terms = {"long": long, "single": single}
    loss = sum(terms[part].double().sum(1) for part in parts)
    return torch.autograd.grad((sampler * loss).sum(), student)[0]


def relative_error(gradient, expected):
    return ((gradient - expected).norm() / expected.norm()).item()


def test_the_enumeration_is_complete(tables):
    assert len(TEXTS) == 15
    assert len(PREFIXES) == 7
    for table in tables:
        assert text_logprobs(table).exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["token", "prefix", "exact"])
def test_long_plus_single_is_the_gradient_of_reverse_kl_on_the_students_own_texts(kind, tables):
    gradient = expected_gradient(*tables, alpha=0.0, kind=kind)
    torch.testing.assert_close(gradient, exact_gradient(*tables), rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_exact_weights_keep_the_gradient_on_mixed_texts(alpha, tables):
    gradient = expected_gradient(*tables, alpha=alpha, kind="exact")
    torch.testing.assert_close(gradient, exact_gradient(*tables), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["token", "prefix"])
def test_the_papers_weights_are_biased_on_mixed_texts(kind, tables):
    error = relative_error(expected_gradient(*tables, alpha=0.2, kind=kind), exact_gradient(*tables))
    assert 0.02 < error < 0.3


def test_prefix_weights_bias_long_alone(tables):
    def parts(alpha, kind, part):
        return expected_gradient(*tables, alpha=alpha, kind=kind, parts=(part,))

    single, long = (parts(0.0, "token", part) for part in ("single", "long"))
    assert relative_error(parts(0.2, "prefix", "single"), single) < 1e-6
    assert relative_error(parts(0.2, "exact", "single"), single) < 1e-6
    assert relative_error(parts(0.2, "prefix", "long"), long) > 0.02
    assert relative_error(parts(0.2, "exact", "long"), long) < 1e-6


def test_the_reference_codes_return_counts_single_twice(tables):
    gradient = expected_gradient(*tables, alpha=0.0, kind="token", include_current=True)
    single = expected_gradient(*tables, alpha=0.0, kind="token", parts=("single",))
    torch.testing.assert_close(gradient, exact_gradient(*tables) + single, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7])
def test_token_weights_have_mean_one_after_every_prefix(alpha, tables):
    log_q, log_p = (table.detach().log_softmax(-1) for table in tables)
    weights = importance_weights(log_q, log_p, alpha, torch.ones_like(log_q), "token")
    mixture = alpha * log_p.exp() + (1 - alpha) * log_q.exp()
    torch.testing.assert_close((mixture * weights).sum(-1), torch.ones(len(PREFIXES), dtype=torch.float64))
    assert (weights >= 0).all()
    assert (weights <= 1 / (1 - alpha) + 1e-12).all()


@pytest.mark.parametrize("kind", ["token", "prefix", "exact"])
def test_a_student_equal_to_its_teacher_has_no_gradient(kind, tables):
    student, _ = tables
    gradient = expected_gradient(student, student.detach(), alpha=0.2, kind=kind)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-7)
