"""Divergences against torch.distributions, numpy loops, finite differences and the identities between them."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from lit_distill.functional import (
    adaptive_kl,
    entropy,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    total_variation,
)

INF = math.inf
DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": partial(jensen_shannon, beta=0.3),
    "skew_forward_kl": partial(skew_forward_kl, skew=0.2),
    "skew_reverse_kl": partial(skew_reverse_kl, skew=0.2),
    "total_variation": total_variation,
    "adaptive_kl": adaptive_kl,
    "soft_cross_entropy": soft_cross_entropy,
}
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys())


def softmax64(logits, temperature=1.0):
    z = np.asarray(logits, dtype=np.float64) / temperature
    e = np.exp(z - z.max())
    return e / e.sum()


def kl64(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def slow(name, student, teacher, temperature=1.0):
    """One row in float64, from the formulas of the papers."""
    q, p = softmax64(student, temperature), softmax64(teacher, temperature)
    if name == "adaptive_kl":
        head, mass = set(), 0.0
        for token in sorted(range(len(p)), key=lambda v: -p[v]):
            if mass >= 0.5:
                break
            head.add(token)
            mass += p[token]
        gap = np.abs(p - q)
        weight = sum(gap[v] for v in head) / gap.sum()
        return weight * kl64(p, q) + (1 - weight) * kl64(q, p)
    m = 0.3 * p + 0.7 * q
    return {
        "forward_kl": lambda: kl64(p, q),
        "reverse_kl": lambda: kl64(q, p),
        "jensen_shannon": lambda: 0.3 * kl64(p, m) + 0.7 * kl64(q, m),
        "skew_forward_kl": lambda: kl64(p, 0.2 * p + 0.8 * q),
        "skew_reverse_kl": lambda: kl64(q, 0.8 * p + 0.2 * q),
        "total_variation": lambda: 0.5 * np.abs(p - q).sum(),
        "soft_cross_entropy": lambda: -(p * np.log(q)).sum(),
    }[name]()


def gradient(divergence, student, teacher):
    student = student.clone().requires_grad_()
    value = divergence(student, teacher)
    (grad,) = torch.autograd.grad(value, student, torch.ones_like(value))
    return value.detach(), grad


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(2, 4, 7, generator=generator), 2 * torch.randn(2, 4, 7, generator=generator)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_follow_the_papers_formulas(name, temperature, logits):
    student, teacher = logits
    value = DIVERGENCES[name](student, teacher, temperature=temperature)
    expected = [
        [slow(name, s, t, temperature) for s, t in zip(*rows, strict=True)]
        for rows in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "adaptive_kl"])
def test_gradients_follow_finite_differences(name, logits):
    student, teacher = (x[0, :2] for x in logits)
    _, grad = gradient(DIVERGENCES[name], student, teacher)
    for row in range(2):
        for token in range(7):
            step = np.zeros(7)
            step[token] = 1e-5
            up, down = (slow(name, student[row].numpy() + s, teacher[row].numpy()) for s in (step, -step))
            assert grad[row, token].item() == pytest.approx((up - down) / 2e-5, abs=2e-5)


def test_adaptive_kl_treats_its_weights_as_constants(logits):
    student, teacher = (x[0, :1] for x in logits)
    value, grad = gradient(adaptive_kl, student, teacher)
    forward, reverse = gradient(forward_kl, student, teacher), gradient(reverse_kl, student, teacher)
    weight = (value - reverse[0]) / (forward[0] - reverse[0])
    assert 0 < weight.item() < 1
    torch.testing.assert_close(grad, weight * forward[1] + (1 - weight) * reverse[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("head_mass", "head"), [(0.35, 1), (0.45, 2), (0.65, 2), (0.75, 3), (0.95, 4)])
def test_the_head_of_adaptive_kl_is_the_fewest_tokens_that_reach_its_mass(head_mass, head):
    p, q = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.4, 0.3])
    gap = (p - q).abs()
    weight = gap[:head].sum() / gap.sum()
    shuffle = torch.tensor([2, 0, 3, 1])
    expected = weight * kl64(p, q) + (1 - weight) * kl64(q, p)
    value = adaptive_kl(q[shuffle].log(), p[shuffle].log(), head_mass=head_mass)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.5, 6.0], ids=["equal tokens", "large head", "small head"])
def test_adaptive_kl_is_the_same_with_a_vocabulary_that_is_not_sorted_as_a_whole(scale, monkeypatch):
    numbers = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(20, 1000, generator=numbers) for _ in range(2))
    student = student + torch.randn(20, 1000, generator=numbers)
    teacher[:5, ::3] = teacher[:5, :1]  # ties
    found = gradient(adaptive_kl, student, teacher)
    monkeypatch.setattr("lit_distill.functional.weighted_kl.HEAD_TOKENS", 1000)
    torch.testing.assert_close(found, gradient(adaptive_kl, student, teacher), rtol=1e-5, atol=1e-7)


def test_kl_agrees_with_torch_distributions_including_its_infinities():
    student = torch.tensor([[0.0, 1.0, -INF], [0.3, -1.0, 2.0], [0.0, 1.0, -INF]])
    teacher = torch.tensor([[1.0, 0.0, -INF], [0.0, 1.0, -INF], [0.0, 1.0, 2.0]])
    q, p = Categorical(logits=student), Categorical(logits=teacher)
    torch.testing.assert_close(forward_kl(student, teacher), kl_divergence(p, q))
    torch.testing.assert_close(reverse_kl(student, teacher), kl_divergence(q, p))
    assert forward_kl(student, teacher).isinf().tolist() == [False, False, True]
    assert reverse_kl(student, teacher).isinf().tolist() == [False, True, False]


def test_entropy_agrees_with_torch_distributions(logits):
    torch.testing.assert_close(entropy(logits[0], 2.0), Categorical(logits=logits[0] / 2).entropy())


@every_divergence
def test_no_infinite_logit_makes_a_nan(divergence):
    rows = [
        ([0.0, 1.0, -INF], [1.0, 0.0, -INF]),
        ([0.0, 1.0, 2.0], [1.0, -INF, 0.0]),
        ([0.0, -INF, 2.0], [1.0, 3.0, 0.0]),
        ([0.0, -INF, 2.0], [-INF, 3.0, 0.0]),
        ([0.0, -INF, -INF], [0.0, -INF, -INF]),
        ([0.0, -INF, -INF], [-INF, -INF, 0.0]),
        ([3.0, 1.0, 2.0], [-INF, -INF, 0.0]),
        ([1e30, 0.0, -1e30], [-1e30, 0.0, 1e30]),
        ([torch.finfo(torch.float32).min, 0.0, 1.0], [1.0, 0.0, torch.finfo(torch.float32).min]),
    ]
    value, grad = gradient(divergence, torch.tensor([s for s, _ in rows]), torch.tensor([t for _, t in rows]))
    assert not value.isnan().any()
    assert (value >= -1e-6).all()
    assert grad.isfinite().all()


@every_divergence
def test_tokens_masked_in_both_change_nothing_and_get_no_gradient(divergence, logits):
    student, teacher = (x[0] for x in logits)
    masked = torch.tensor([False, True, False, False, True, False, True])
    value, grad = gradient(divergence, student.masked_fill(masked, -INF), teacher.masked_fill(masked, -INF))
    expected, expected_grad = gradient(divergence, student[:, ~masked], teacher[:, ~masked])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad[:, ~masked], expected_grad)
    assert (grad[:, masked] == 0).all()


@every_divergence
def test_a_student_equal_to_its_teacher_is_at_the_minimum(divergence, logits):
    one_hot = torch.full((1, 7), -INF).index_fill(1, torch.tensor([3]), 0.0)
    for same in (logits[0][0], one_hot, torch.zeros(1, 7)):
        value, grad = gradient(divergence, same, same)
        floor = entropy(same) if divergence is soft_cross_entropy else torch.zeros_like(value)
        torch.testing.assert_close(value, floor, rtol=0, atol=1e-6)
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


@pytest.mark.parametrize("infinite", [forward_kl, soft_cross_entropy])
def test_forward_gradient_closes_an_infinite_gap_within_the_possible_tokens(infinite):
    value, grad = gradient(infinite, torch.tensor([0.0, 1.0, -INF]), torch.tensor([0.0, 0.0, 0.0]))
    assert value.item() == INF
    assert grad[2] == 0
    assert grad.sum().item() == pytest.approx(0, abs=1e-6)


def test_reverse_gradient_leaves_a_token_that_the_teacher_cannot_say():
    value, grad = gradient(reverse_kl, torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, -INF]))
    assert value.item() == INF
    assert grad[2] > 0 > grad[:2].max()


@every_divergence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_input_dtype_is_computed_in_float32(divergence, dtype, logits):
    student, teacher = (x.to(dtype) for x in logits)
    value, grad = gradient(divergence, student, teacher)
    expected, expected_grad = gradient(divergence, student.float(), teacher.float())
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad.to(dtype))


@every_divergence
def test_autocast_changes_nothing(divergence, logits):
    expected = gradient(divergence, *logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grad = gradient(divergence, *logits)
    assert torch.equal(value, expected[0])
    assert torch.equal(grad, expected[1])


@every_divergence
def test_the_teacher_gets_no_gradient(divergence, logits):
    teacher = logits[1].clone().requires_grad_()
    divergence(logits[0].clone().requires_grad_(), teacher).sum().backward()
    assert teacher.grad is None


def test_jensen_shannon_tends_to_forward_and_reverse_kl(logits):
    small = 1e-3
    near_forward = jensen_shannon(*logits, beta=small) / small
    near_reverse = jensen_shannon(*logits, beta=1 - small) / small
    torch.testing.assert_close(near_forward, forward_kl(*logits), rtol=0.05, atol=5e-3)
    torch.testing.assert_close(near_reverse, reverse_kl(*logits), rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jensen_shannon_is_a_mix_of_the_skew_divergences(beta, logits):
    skewed = beta * skew_forward_kl(*logits, skew=beta) + (1 - beta) * skew_reverse_kl(*logits, skew=1 - beta)
    torch.testing.assert_close(jensen_shannon(*logits, beta=beta), skewed)


@pytest.mark.parametrize("skewed", [skew_forward_kl, skew_reverse_kl])
@pytest.mark.parametrize("skew", [0.01, 0.1, 0.9])
def test_skew_bounds_the_divergence_by_minus_log_skew(skewed, skew):
    apart = torch.tensor([40.0, -40.0]), torch.tensor([-40.0, 40.0])
    assert skewed(*apart, skew=skew).item() == pytest.approx(-math.log(skew), rel=1e-5)


def test_soft_cross_entropy_is_forward_kl_plus_the_teachers_entropy_with_the_same_gradient(logits):
    cross, cross_grad = gradient(soft_cross_entropy, *logits)
    forward, forward_grad = gradient(forward_kl, *logits)
    torch.testing.assert_close(cross, forward + entropy(logits[1]))
    torch.testing.assert_close(cross_grad, forward_grad)


@every_divergence
def test_vocabularies_of_different_size_are_refused_with_the_slice_to_take(divergence):
    with pytest.raises(ValueError, match=r"student scores 5 .* teacher 8.*logits\[\.\.\., :5\]"):
        divergence(torch.zeros(2, 5), torch.zeros(2, 8))


def test_logits_of_different_positions_are_refused():
    with pytest.raises(ValueError, match=r"\[3, 5\] and \[2, 5\]"):
        forward_kl(torch.zeros(3, 5), torch.zeros(2, 5))


@every_divergence
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, INF])
def test_a_temperature_that_is_not_positive_is_refused(divergence, temperature):
    with pytest.raises(ValueError, match="temperature: "):
        divergence(torch.zeros(3), torch.zeros(3), temperature=temperature)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(jensen_shannon, beta=0), "beta: 0 .*forward_kl"),
        (partial(jensen_shannon, beta=1.0), "beta: 1.0 .*reverse_kl"),
        (partial(jensen_shannon, beta=1.5), "beta: .*1.5"),
        (partial(skew_forward_kl, skew=0), "skew: 0 .*forward_kl"),
        (partial(skew_reverse_kl, skew=0.0), "skew: 0 .*reverse_kl"),
        (partial(skew_forward_kl, skew=1), "skew: .*1"),
        (partial(adaptive_kl, head_mass=0), "head_mass: .*0"),
    ],
)
def test_a_parameter_outside_its_range_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3), torch.zeros(3))
