"""The mix of both KLs by the teacher's entropy, against sums in float64 and the KLs themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical

from lit_distill.functional import entropy_gate, entropy_gated_kl, forward_kl, reverse_kl

INF = math.inf


@pytest.fixture
def logits():
    """Student and teacher, [2, 4, 6]; the teacher's rows go from certain to uncertain."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher * torch.tensor([8.0, 4.0, 1.0, 0.3])[:, None]


def softmax64(row, temperature):
    e = np.exp(np.asarray(row, dtype=np.float64) / temperature)
    return e / e.sum()


def slow(student, teacher, threshold, width, temperature):
    """Weight, value and gradient of one row; the weight is a constant."""
    q, p = softmax64(student, temperature), softmax64(teacher, temperature)
    entropy = -(p * np.log(p)).sum()
    weight = float(entropy > threshold) if width == 0 else 1 / (1 + math.exp((threshold - entropy) / width))
    forward, reverse = (p * np.log(p / q)).sum(), (q * np.log(q / p)).sum()
    gradient = weight * (q - p) + (1 - weight) * q * (np.log(q / p) - reverse)
    return weight, weight * forward + (1 - weight) * reverse, gradient / temperature


def gradient_of(value, student):
    return torch.autograd.grad(value.sum(), student)[0]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(("threshold", "width"), [(1.0, 0.0), (0.6, 0.25), (1.2, 0.25), (0.6, 2.0)])
def test_weight_value_and_gradient_follow_enumeration(threshold, width, temperature, logits):
    student, teacher = logits[0].clone().requires_grad_(), logits[1]
    value = entropy_gated_kl(student, teacher, threshold, width, temperature)
    rows = zip(*(x.flatten(0, 1).numpy() for x in logits), strict=True)
    weights, values, gradients = (
        torch.tensor(np.stack(parts))
        for parts in zip(*(slow(*row, threshold, width, temperature) for row in rows), strict=True)
    )
    gate = entropy_gate(teacher, threshold, width, temperature)
    torch.testing.assert_close(gate.flatten().double(), weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(value.flatten().double(), values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient_of(value, student).flatten(0, 1), gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("threshold", "pure"), [(-1.0, forward_kl), (math.log(6) + 0.1, reverse_kl)])
def test_a_threshold_that_all_rows_exceed_is_forward_kl_and_one_that_none_reaches_is_reverse_kl(
    threshold, pure, logits
):
    student = logits[0].clone().requires_grad_()
    value, expected = entropy_gated_kl(student, logits[1], threshold), pure(student, logits[1])
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient_of(value, student), gradient_of(expected, student), rtol=1e-6, atol=1e-6)


def test_each_row_takes_its_own_divergence(logits):
    student, teacher = logits
    entropy = Categorical(logits=teacher).entropy()
    assert 0 < (entropy > 1.0).double().mean() < 1
    expected = torch.where(entropy > 1.0, forward_kl(student, teacher), reverse_kl(student, teacher))
    torch.testing.assert_close(entropy_gated_kl(student, teacher, 1.0), expected, rtol=1e-6, atol=1e-6)


def test_the_weight_does_not_depend_on_the_student(logits):
    student, teacher = (x[0] for x in logits)
    equal = teacher.clone().requires_grad_()
    value = entropy_gated_kl(equal, teacher, 1.0, 0.5)
    torch.testing.assert_close(value, torch.zeros(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient_of(value, equal), torch.zeros(4, 6).double(), rtol=0, atol=1e-6)
    weight = entropy_gate(teacher, 1.0, 0.5)
    for other in (student, -student):
        expected = weight * forward_kl(other, teacher) + (1 - weight) * reverse_kl(other, teacher)
        torch.testing.assert_close(entropy_gated_kl(other, teacher, 1.0, 0.5), expected, rtol=1e-6, atol=1e-6)


def test_only_the_divergence_that_counts_can_be_infinite():
    student = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, -INF]])
    teacher = torch.tensor([[0.0, 1.0, -INF], [0.0, 1.0, 0.0]])  # the KL that is infinite: reverse, forward
    for threshold, infinite in ((-1.0, [False, True]), (9.0, [True, False])):
        row = student.clone().requires_grad_()
        value = entropy_gated_kl(row, teacher, threshold)
        assert value.isinf().tolist() == infinite
        assert gradient_of(value, row).isfinite().all()
    assert entropy_gated_kl(student, teacher, 1.0, 1.0).isinf().all()


def test_no_gradient_reaches_the_teacher_and_any_dtype_is_computed_in_float32(logits):
    student, teacher = (x.bfloat16().requires_grad_() for x in logits)
    value = entropy_gated_kl(student, teacher, 1.0, 0.5)
    assert torch.equal(value, entropy_gated_kl(student.float(), teacher.float(), 1.0, 0.5))
    value.sum().backward()
    assert teacher.grad is None
    assert student.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": math.nan}, "^threshold: .*nan"),
        ({"width": -0.1}, "^width: .*-0.1"),
        ({"width": INF}, "^width: .*inf"),
        ({"temperature": 0.0}, "^temperature: "),
    ],
)
def test_an_argument_outside_its_range_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        entropy_gated_kl(torch.zeros(2, 6), torch.zeros(2, 6), **arguments)
    with pytest.raises(ValueError, match=message):
        entropy_gate(torch.zeros(2, 6), **arguments)
