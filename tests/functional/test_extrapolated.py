"""Reverse KL to p^λ ref^(1−λ)/Z against sums in float64, its minimum, and the sum of two KLs that it equals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lit_distill.functional import extrapolated_reverse_kl, reverse_kl

INF = math.inf


@pytest.fixture
def logits():
    """Student, teacher and reference, [4, 6]."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(3))


def softmax64(row, temperature=1.0):
    e = np.exp(np.asarray(row, dtype=np.float64) / temperature)
    return e / e.sum()


def target64(teacher, reference, scale, temperature=1.0):
    weights = softmax64(teacher, temperature) ** scale * softmax64(reference, temperature) ** (1 - scale)
    return weights / weights.sum()


def gradient_of(value, student):
    return torch.autograd.grad(value.sum(), student)[0]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("scale", [0.4, 1.0, 1.25, 2.0])
def test_value_and_gradient_are_those_of_reverse_kl_to_the_normalised_product(scale, temperature, logits):
    student = logits[0].clone().requires_grad_()
    value = extrapolated_reverse_kl(student, *logits[1:], scale, temperature)
    values, gradients = [], []
    for row in zip(*(x.numpy() for x in logits), strict=True):
        q, target = softmax64(row[0], temperature), target64(row[1], row[2], scale, temperature)
        values.append((q * np.log(q / target)).sum())
        gradients.append(q * (np.log(q / target) - values[-1]) / temperature)
    torch.testing.assert_close(value.double(), torch.tensor(np.stack(values)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient_of(value, student), torch.tensor(np.stack(gradients)), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("scale", [0.4, 1.25, 2.0])
def test_descent_ends_at_the_normalised_product(scale, logits):
    """Descent on the student's logits in float64; the expected end comes from the formula alone."""
    student = logits[0].clone()
    for _ in range(3000):
        student.requires_grad_()
        gradient = gradient_of(extrapolated_reverse_kl(student, *logits[1:], scale), student)
        student = student.detach() - 2.0 * gradient
    expected = np.stack([target64(*row, scale) for row in zip(*(x.numpy() for x in logits[1:]), strict=True)])
    torch.testing.assert_close(student.softmax(-1), torch.tensor(expected), rtol=0, atol=1e-5)


def test_beyond_the_teacher_the_student_moves_further_from_the_reference_than_the_teacher_did(logits):
    _, teacher, reference = logits
    student = teacher.clone().requires_grad_()  # a student that has arrived
    step = -gradient_of(extrapolated_reverse_kl(student, teacher, reference, 1.25), student)
    gained = teacher.log_softmax(-1) - reference.log_softmax(-1)
    assert ((step * gained).sum(-1) > 1e-3).all()
    back = -gradient_of(extrapolated_reverse_kl(student, teacher, reference, 0.8), student)
    assert ((back * gained).sum(-1) < -1e-3).all()


@pytest.mark.parametrize("b", [0.25, 1.0, 3.0])
def test_a_scale_below_one_is_reverse_kl_plus_b_times_the_kl_to_the_reference(b, logits):
    student, teacher, reference = logits[0].clone().requires_grad_(), *logits[1:]
    scaled = (1 + b) * extrapolated_reverse_kl(student, teacher, reference, 1 / (1 + b))
    both = reverse_kl(student, teacher) + b * reverse_kl(student, reference)
    torch.testing.assert_close(gradient_of(scaled, student), gradient_of(both, student), rtol=1e-6, atol=1e-6)
    constant = (both - scaled).detach()  # −(1 + b) log Z, whatever the student
    torch.testing.assert_close(
        (1 + b) * extrapolated_reverse_kl(-student, teacher, reference, 1 / (1 + b)) + constant,
        reverse_kl(-student, teacher) + b * reverse_kl(-student, reference),
        rtol=1e-5,
        atol=1e-5,
    )


def test_with_scale_one_the_reference_does_not_count(logits):
    student, teacher, reference = logits
    expected = reverse_kl(student, teacher)
    torch.testing.assert_close(extrapolated_reverse_kl(student, teacher, reference, 1.0), expected)
    nothing = torch.full_like(reference, -INF).index_fill(1, torch.tensor([2]), 0.0)
    torch.testing.assert_close(extrapolated_reverse_kl(student, teacher, nothing, 1.0), expected)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.25, 3.0])
def test_impossible_tokens_make_no_nan_and_finite_gradients(scale):
    some = [
        [0.0, 1.0, 2.0],
        [0.0, -INF, 1.0],
        [-INF, 1.0, 0.0],
        [0.0, -INF, -INF],
        [-INF, -INF, 0.0],
        [-3e38, 1.0, 0.0],
    ]
    student, teacher, reference = (
        torch.tensor(x) for x in zip(*[(a, b, c) for a in some for b in some for c in some], strict=True)
    )
    student.requires_grad_()
    value = extrapolated_reverse_kl(student, teacher, reference, scale)
    assert not value.isnan().any()
    assert (value >= -1e-5).all()
    assert gradient_of(value, student).isfinite().all()
    infinite = ((student > -1e30) & (teacher <= -1e30)).any(-1)
    assert torch.equal(value.isinf(), infinite)


def test_a_token_that_only_the_reference_finds_impossible_keeps_the_teachers_probability_beyond_the_teacher():
    student = torch.tensor([0.3, -0.4, 0.1], dtype=torch.float64)
    p, ref = softmax64([1.0, 0.0, 0.5]), softmax64([0.0, 1.0])
    weights = np.array([p[0] ** 1.25 * ref[0] ** -0.25, p[1] ** 1.25 * ref[1] ** -0.25, p[2]])
    q, target = softmax64(student), weights / weights.sum()
    value = extrapolated_reverse_kl(student, torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.0, 1.0, -INF]), 1.25)
    assert value.item() == pytest.approx((q * np.log(q / target)).sum(), abs=1e-6)


def test_no_gradient_reaches_teacher_or_reference_and_any_dtype_is_computed_in_float32(logits):
    student, teacher, reference = (x.bfloat16().requires_grad_() for x in logits)
    value = extrapolated_reverse_kl(student, teacher, reference)
    expected = extrapolated_reverse_kl(student.float(), teacher.float(), reference.float())
    assert torch.equal(value, expected)
    value.sum().backward()
    assert teacher.grad is reference.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, INF])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match=r"^scale: expected a finite number > 0"):
        extrapolated_reverse_kl(*torch.zeros(3, 2, 6), scale)


def test_a_reference_of_another_vocabulary_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^reference_logits: expected the shape \[2, 6\] .* got \[2, 5\]"):
        extrapolated_reverse_kl(*torch.zeros(2, 2, 6), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"student scores 6 .* teacher 5"):
        extrapolated_reverse_kl(torch.zeros(2, 6), torch.zeros(2, 5), torch.zeros(2, 6))
