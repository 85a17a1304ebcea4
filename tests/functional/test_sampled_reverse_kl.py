"""The estimate from one token: its mean over all tokens and over all responses of two tokens, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lit_distill.functional import reverse_kl, sampled_reverse_kl

INF = math.inf
V = 6
with_and_without = pytest.mark.parametrize("baseline", [True, False])


@pytest.fixture
def tables():
    """Student and teacher: logits of the first token [6], and of the second after each first one [6, 6]."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((V,), (V, V))] for _ in range(2)
    )


def softmax64(row, temperature=1.0):
    e = np.exp(np.asarray(row, dtype=np.float64) / temperature)
    return e / e.sum()


def exact(student, teacher, temperature):
    """Value and gradient of KL(q‖p) of one row."""
    q, p = softmax64(student, temperature), softmax64(teacher, temperature)
    value = (q * np.log(q / p)).sum()
    return value, q * (np.log(q / p) - value) / temperature


def estimates(student, teacher, baseline, temperature):
    """For every token y of one row: its probability, the value and the gradient ``[6, 6]``."""
    rows = student.expand(V, V).clone().requires_grad_()
    value = sampled_reverse_kl(rows, teacher.expand(V, V), torch.arange(V), baseline, temperature)
    return torch.tensor(softmax64(student, temperature)), value.detach(), torch.autograd.grad(value.sum(), rows)[0]


@with_and_without
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_value_and_gradient_of_each_token_are_its_policy_gradient(temperature, baseline, tables):
    student, teacher = tables[0][0], tables[1][0]
    _, value, gradient = estimates(student, teacher, baseline, temperature)
    q, p = softmax64(student, temperature), softmax64(teacher, temperature)
    b = exact(student, teacher, temperature)[0] if baseline else 0.0
    for y in range(V):
        ratio = math.log(q[y] / p[y])
        assert value[y].item() == pytest.approx(ratio, abs=1e-6)
        expected = (ratio - b) * (np.eye(V)[y] - q) / temperature
        torch.testing.assert_close(gradient[y], torch.tensor(expected), rtol=1e-6, atol=2e-6)


@with_and_without
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_mean_value_and_mean_gradient_over_all_tokens_are_those_of_reverse_kl(temperature, baseline, tables):
    for student, teacher in ((tables[0][0], tables[1][0]), *zip(tables[0][1], tables[1][1], strict=True)):
        law, values, gradients = estimates(student, teacher, baseline, temperature)
        value, gradient = exact(student.numpy(), teacher.numpy(), temperature)
        assert (law * values).sum().item() == pytest.approx(value, abs=1e-6)
        torch.testing.assert_close((law[:, None] * gradients).sum(0), torch.tensor(gradient), rtol=0, atol=1e-6)


def variance(student, teacher, baseline):
    law, _, gradients = estimates(student, teacher, baseline, 1.0)
    spread = gradients - (law[:, None] * gradients).sum(0)
    return (law * spread.square().sum(-1)).sum().item()


def test_the_baseline_lowers_the_variance_where_the_student_is_undecided(tables):
    for student, teacher in zip(0.3 * tables[0][1], tables[1][1], strict=True):
        assert 0 < variance(student, teacher, True) < variance(student, teacher, False)


def test_the_baseline_raises_the_variance_where_the_student_is_confident_and_the_teacher_disagrees():
    """The exception in the docstring: b is right for the token that is nearly always drawn, whose gradient is small anyway."""
    student, teacher = (torch.tensor(x, dtype=torch.float64) for x in ([4.0, 0, 0, 0, 0, 0], [0.0, 4, 0, 0, 0, 0]))
    assert variance(student, teacher, True) > 2 * variance(student, teacher, False)


def over_responses(tables, baseline, temperature=1.0):
    """All 36 responses: their probabilities, the mean gradient by both of the student's tables, and the variance."""
    (first, second), (teacher_first, teacher_second) = tables
    y = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    law, gradients = [], []
    for response in y:
        parameters = [first.clone().requires_grad_(), second.clone().requires_grad_()]
        student = torch.stack([parameters[0], parameters[1][response[0]]])
        teacher = torch.stack([teacher_first, teacher_second[response[0]]])
        values = sampled_reverse_kl(student, teacher, response, baseline, temperature)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(values.sum(), parameters)]))
        q1, q2 = softmax64(first, temperature), softmax64(second[response[0]], temperature)
        law.append(q1[response[0]] * q2[response[1]])
    law, gradients = torch.tensor(law)[:, None], torch.stack(gradients)
    assert law.sum().item() == pytest.approx(1)
    mean = (law * gradients).sum(0)
    return mean, (law * (gradients - mean).square()).sum().item()


@with_and_without
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_over_whole_responses_the_mean_gradient_is_that_of_the_token_level_reverse_kl(temperature, baseline, tables):
    (first, second), (teacher_first, teacher_second) = tables
    gradient = [exact(first.numpy(), teacher_first.numpy(), temperature)[1]]
    q = softmax64(first, temperature)
    gradient += [q[y] * exact(second[y].numpy(), teacher_second[y].numpy(), temperature)[1] for y in range(V)]
    mean, _ = over_responses(tables, baseline, temperature)
    torch.testing.assert_close(mean, torch.tensor(np.concatenate(gradient)), rtol=0, atol=1e-6)


def test_over_whole_responses_the_baseline_lowers_the_variance(tables):
    assert 0 < over_responses(tables, True)[1] < over_responses(tables, False)[1]


def test_tokens_of_a_truncated_sampler_bias_it(tables):
    """The gap that the docstring warns of: the two least probable tokens are never drawn."""
    student, teacher = tables[0][0], tables[1][0]
    law, values, gradients = estimates(student, teacher, True, 1.0)
    kept = torch.ones(V, dtype=torch.float64).index_fill(0, law.topk(2, largest=False).indices, 0.0)
    truncated = law * kept / (law * kept).sum()
    value, gradient = exact(student.numpy(), teacher.numpy(), 1.0)
    assert abs((truncated * values).sum().item() - value) > 1e-2
    assert ((truncated[:, None] * gradients).sum(0) - torch.tensor(gradient)).abs().max() > 1e-2


@with_and_without
def test_a_token_that_the_teacher_cannot_say_has_infinite_value_and_the_mean_gradient_stays_that_of_reverse_kl(
    baseline,
):
    student, teacher = torch.tensor([0.3, -0.2, 0.5, 0.0, 0.1, -9.0]), torch.tensor([0.0, 1.0, 0.5, -INF, 0.2, 0.0])
    law, values, gradients = estimates(student.double(), teacher.double(), baseline, 1.0)
    assert values.isinf().tolist() == [False, False, False, True, False, False]
    rows = student.double().requires_grad_()
    (expected,) = torch.autograd.grad(reverse_kl(rows, teacher.double()), rows)
    assert expected[3] > 100
    torch.testing.assert_close((law[:, None] * gradients).sum(0), expected, rtol=1e-4, atol=1e-4)


@with_and_without
def test_no_infinite_logit_makes_a_nan(baseline):
    rows = [
        ([0.0, 1.0, -INF], [1.0, 0.0, -INF]),
        ([0.0, 1.0, 2.0], [1.0, -INF, 0.0]),
        ([0.0, -INF, 2.0], [1.0, 3.0, 0.0]),
        ([0.0, -INF, -INF], [-INF, -INF, 0.0]),
        ([-3e38, 0.0, 1.0], [1.0, 0.0, -3e38]),
    ]
    for label in range(3):
        student, teacher = (torch.tensor(side) for side in zip(*rows, strict=True))
        student.requires_grad_()
        value = sampled_reverse_kl(student, teacher, torch.full((5,), label), baseline)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        assert not value.isnan().any()
        assert gradient.isfinite().all()
        unsaid = student[:, label] <= -1e30
        assert gradient[unsaid].eq(0).all()
        assert value.isfinite()[unsaid].all()


def test_no_gradient_reaches_the_teacher_and_any_dtype_is_computed_in_float32(tables):
    student, teacher = (table[1].bfloat16().requires_grad_() for table in tables)
    labels = torch.arange(V)
    value = sampled_reverse_kl(student, teacher, labels)
    assert torch.equal(value, sampled_reverse_kl(student.float(), teacher.float(), labels))
    value.sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_labels_of_other_positions_and_other_vocabularies_are_refused():
    with pytest.raises(ValueError, match=r"^labels: expected one token for each position, \[2\], got \[3\]"):
        sampled_reverse_kl(torch.zeros(2, V), torch.zeros(2, V), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"student scores 6 .* teacher 5"):
        sampled_reverse_kl(torch.zeros(2, V), torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^temperature: "):
        sampled_reverse_kl(torch.zeros(2, V), torch.zeros(2, V), torch.zeros(2, dtype=torch.long), temperature=0.0)
