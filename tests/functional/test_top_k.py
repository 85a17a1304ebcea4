"""KL on the k most probable tokens against sums in float64, and against the form that is not renormalised."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lit_distill.functional import forward_kl, reverse_kl, top_k_forward_kl, top_k_overlap, top_k_reverse_kl

INF = math.inf
DIVERGENCES = {"forward": top_k_forward_kl, "reverse": top_k_reverse_kl}
both = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys())
either = pytest.mark.parametrize("support", ["teacher", "student"])


@pytest.fixture
def logits():
    """Student and teacher, [4, 6]; their most probable tokens differ."""
    generator = torch.Generator().manual_seed(0)
    return tuple(2 * torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))


def softmax64(row, temperature=1.0):
    e = np.exp(np.asarray(row, dtype=np.float64) / temperature)
    return e / e.sum()


def most_probable(row, k):
    return sorted(range(len(row)), key=lambda v: -row[v])[:k]


def slow(name, student, teacher, k, support, temperature):
    """Value and gradient of one row: probabilities over V, restricted to S, divided by their sum."""
    ids = most_probable(teacher if support == "teacher" else student, k)
    q, p = (softmax64(row, temperature) for row in (student, teacher))
    q_s, p_s = {v: q[v] / q[ids].sum() for v in ids}, {v: p[v] / p[ids].sum() for v in ids}
    first, second = (p_s, q_s) if name == "forward" else (q_s, p_s)
    value = sum(first[v] * math.log(first[v] / second[v]) for v in ids)
    gradient = np.zeros(len(q))
    for v in ids:
        gradient[v] = (
            q_s[v] - p_s[v] if name == "forward" else q_s[v] * (math.log(q_s[v] / p_s[v]) - value)
        ) / temperature
    return value, gradient


def gradient_of(value, student):
    return torch.autograd.grad(value.sum(), student)[0]


@either
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient_are_those_of_both_distributions_renormalised_over_the_support(
    name, k, temperature, support, logits
):
    student, teacher = logits[0].clone().requires_grad_(), logits[1]
    value = DIVERGENCES[name](student, teacher, k, support, temperature)
    expected = [slow(name, *rows, k, support, temperature) for rows in zip(*(x.numpy() for x in logits), strict=True)]
    values, gradients = (torch.tensor(np.stack(parts)) for parts in zip(*expected, strict=True))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), values, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient_of(value, student), gradients, rtol=0, atol=1e-6)


@either
@pytest.mark.parametrize(("divergence", "full"), [(top_k_forward_kl, forward_kl), (top_k_reverse_kl, reverse_kl)])
def test_with_all_tokens_it_is_the_divergence_of_the_full_vocabulary(divergence, full, support, logits):
    student = logits[0].clone().requires_grad_()
    value, expected = divergence(student, logits[1], 6, support), full(student, logits[1])
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient_of(value, student), gradient_of(expected, student), rtol=0, atol=1e-6)
    fewer = divergence(student, logits[1], 3, support)
    assert ((fewer - expected).abs() > 1e-3).all()


def unrenormalised_reverse_kl(student, teacher, k):
    """The sum over S of q log q/p, with the probabilities of the full vocabulary."""
    ids = teacher.topk(k).indices
    log_q, log_p = (x.log_softmax(-1).gather(-1, ids) for x in (student, teacher))
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def test_without_renormalisation_a_student_equal_to_its_teacher_is_pushed_out_of_the_support(logits):
    teacher = logits[1]
    student = teacher.clone().requires_grad_()
    gradient = gradient_of(unrenormalised_reverse_kl(student, teacher, 3), student)
    q = torch.tensor(np.stack([softmax64(row) for row in teacher.numpy()]))
    inside = torch.zeros(4, 6, dtype=torch.float64)
    for row, kept in enumerate(inside):
        kept[most_probable(teacher[row].tolist(), 3)] = 1
    torch.testing.assert_close(gradient, q * (inside - (q * inside).sum(-1, keepdim=True)))  # the gradient of q(S)
    assert (gradient[inside.bool()] > 1e-3).all()  # descent lowers the tokens of the teacher
    assert (gradient[~inside.bool()] < -1e-5).all()


@either
@both
def test_with_renormalisation_a_student_equal_to_its_teacher_is_at_the_minimum(divergence, support, logits):
    student = logits[1].clone().requires_grad_()
    value = divergence(student, logits[1], 3, support)
    torch.testing.assert_close(value, torch.zeros(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient_of(value, student), torch.zeros(4, 6).double(), rtol=0, atol=1e-6)


@both
def test_what_lies_outside_the_support_is_invisible(divergence, logits):
    student, teacher = logits
    value = divergence(student, teacher, 3)
    outside = torch.ones(4, 6, dtype=torch.bool).scatter(1, teacher.topk(3).indices, False)
    torch.testing.assert_close(divergence(student.masked_fill(outside, 9.0), teacher, 3), value)
    assert ((divergence(student.masked_fill(outside, 9.0), teacher, 4) - value).abs() > 1e-3).all()


def test_no_gradient_reaches_the_teacher(logits):
    student, teacher = (x.clone().requires_grad_() for x in logits)
    top_k_reverse_kl(student, teacher, 3).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@either
def test_the_overlap_counts_common_tokens_and_the_masses_are_of_the_support(support, logits):
    found = top_k_overlap(*logits, 3, support, temperature=1.5)
    for row, (student, teacher) in enumerate(zip(*(x.numpy() for x in logits), strict=True)):
        sets = {"student": most_probable(student, 3), "teacher": most_probable(teacher, 3)}
        assert float(found.overlap[row]) == pytest.approx(len(set(sets["student"]) & set(sets["teacher"])) / 3)
        assert float(found.student_mass[row]) == pytest.approx(softmax64(student, 1.5)[sets[support]].sum(), abs=1e-6)
        assert float(found.teacher_mass[row]) == pytest.approx(softmax64(teacher, 1.5)[sets[support]].sum(), abs=1e-6)
    assert 0 < float(found.overlap.mean()) < 1


@either
@both
def test_impossible_tokens_make_no_nan(divergence, support):
    rows = [
        ([0.0, 1.0, -INF, 2.0], [1.0, 0.0, -INF, -INF]),
        ([-INF, -INF, 1.0, 2.0], [1.0, 0.0, -INF, -INF]),
        ([0.0, -INF, -INF, -INF], [0.0, -INF, -INF, -INF]),
        ([-3e38, -3e38, 1.0, 2.0], [1.0, 0.0, -3e38, -3e38]),
    ]
    student, teacher = (torch.tensor(side) for side in zip(*rows, strict=True))
    student.requires_grad_()
    value = divergence(student, teacher, 2, support)
    assert not value.isnan().any()
    assert gradient_of(value, student).isfinite().all()
    assert not any(part.isnan().any() for part in top_k_overlap(student, teacher, 2, support))


@both
@pytest.mark.parametrize("floor", [-INF, -3e38])
def test_where_a_model_finds_the_whole_support_impossible_there_is_nothing_to_compare(divergence, floor):
    student = torch.tensor([[floor, floor, 1.0, 2.0], [0.0, 2.0, 1.0, 2.0]]).requires_grad_()
    value = divergence(student, torch.tensor([[1.0, 0.5, 0.0, 0.0]] * 2), 2)
    assert value[0] == 0 < value[1]
    gradient = gradient_of(value, student)
    assert gradient[0].eq(0).all()
    assert gradient[1, :2].ne(0).all()


def test_a_token_of_the_support_that_one_model_finds_impossible_costs_what_theory_says():
    possible, impossible = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([2.0, -INF, 0.0])
    assert top_k_forward_kl(impossible, possible, 2).item() == INF
    assert top_k_reverse_kl(possible, impossible, 3).item() == INF
    on_student = top_k_forward_kl(possible, impossible, 2, "student")
    assert on_student.item() == pytest.approx(math.log(1 + math.exp(-1)))


@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 7}, r"^top_k: expected at most the 6 tokens .* got 7"),
        ({"top_k": 1}, r"^top_k: expected 2 or more, got 1"),
        ({"top_k": 3, "support": "both"}, r"^support: expected one of teacher, student, got 'both'"),
        ({"top_k": 3, "temperature": 0.0}, r"^temperature: "),
    ],
)
def test_an_argument_outside_its_range_is_refused_by_name(divergence, arguments, message):
    for function in (divergence, top_k_overlap):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(2, 6), torch.zeros(2, 6), **arguments)


@both
def test_vocabularies_of_different_size_are_refused(divergence):
    with pytest.raises(ValueError, match=r"student scores 5 .* teacher 8"):
        divergence(torch.zeros(2, 5), torch.zeros(2, 8), 3)
