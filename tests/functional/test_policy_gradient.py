"""Returns, weights, surrogate and statistics against slow loops; what padding and bad arguments do."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from lit_distill.functional import (
    clipped_surrogate,
    decision_weights,
    effective_sample_size,
    importance_weights,
    is_clipped,
    reverse_kl_k1,
    reverse_kl_k3,
    reward_to_go,
    scale_and_clip_rewards,
    standardize,
)

LENGTHS = [5, 3, 1, 4]
SETTINGS = [(g, c, n) for g in (1.0, 0.95, 0.0) for c in (False, True) for n in (False, True)]


@pytest.fixture
def mask():
    return torch.arange(6) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture
def rollout(mask):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (-3 * torch.rand(mask.shape, generator=generator) - 0.1 for _ in range(2))
    return student, teacher


def slow_reward_to_go(rewards, gamma, include_current, length_normalize):
    returns = []
    for t in range(len(rewards)):
        rest = rewards[t if include_current else t + 1 :]
        total = sum(gamma**k * r for k, r in enumerate(rest))
        returns.append(total / max(len(rest), 1) if length_normalize else total)
    return returns


@pytest.mark.parametrize(("gamma", "include_current", "length_normalize"), SETTINGS)
def test_reward_to_go_is_the_discounted_sum_or_mean_of_what_follows(
    gamma, include_current, length_normalize, rollout, mask
):
    rewards = rollout[1] - rollout[0]
    options = {"gamma": gamma, "include_current": include_current, "length_normalize": length_normalize}
    returns = reward_to_go(rewards, mask, **options)
    for row, length in enumerate(LENGTHS):
        expected = slow_reward_to_go(rewards[row, :length].tolist(), **options)
        torch.testing.assert_close(returns[row, :length], torch.tensor(expected, dtype=torch.float32))
        assert (returns[row, length:] == 0).all()


def test_a_constant_reward_is_its_own_normalised_return_except_at_the_end(mask):
    returns = reward_to_go(torch.full(mask.shape, -0.75), mask)
    for row, length in enumerate(LENGTHS):
        assert returns[row, : length - 1].tolist() == [-0.75] * (length - 1)
        assert returns[row, length - 1] == 0


def test_discount_counts_tokens_not_columns(rollout, mask):
    rewards = rollout[0]
    spread, spread_mask = (torch.zeros(4, 12, dtype=x.dtype) for x in (rewards, mask))
    spread[:, 1::2], spread_mask[:, 1::2] = rewards, mask  # padding on the left of every token
    options = {"gamma": 0.9, "length_normalize": False}
    expected = reward_to_go(rewards, mask, **options)[mask]
    assert torch.equal(reward_to_go(spread, spread_mask, **options)[spread_mask], expected)


FUNCTIONS = {
    "reward_to_go": lambda s, t, m: reward_to_go(t - s, m, gamma=0.95),
    "token weights": lambda s, t, m: importance_weights(s, t, 0.2, m, "token"),
    "prefix weights": lambda s, t, m: importance_weights(s, t, 0.2, m, "prefix"),
    "exact weights": lambda s, t, m: importance_weights(s, t, 0.2, m, "exact"),
    "standardize": lambda s, t, m: standardize(t - s, m),
    "effective_sample_size": lambda s, t, m: effective_sample_size(t.exp(), m).expand_as(m),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
@pytest.mark.parametrize("padding", [1, 7, 130])
@pytest.mark.parametrize("garbage", [0.0, 5.0, math.nan, -math.inf])
def test_padding_changes_no_bit_whatever_it_holds(function, padding, garbage, rollout, mask):
    expected = function(*rollout, mask)
    pad = partial(torch.nn.functional.pad, pad=(0, padding))
    padded = [pad(x.masked_fill(~mask, garbage), value=garbage) for x in rollout]
    result = function(*padded, pad(mask, value=False))
    assert torch.equal(result[:, : mask.shape[1]][mask], expected[mask])


@pytest.mark.parametrize("alpha", [0.2, 0.7, 1.0])
def test_importance_weights_are_the_products_their_names_say(alpha, rollout, mask):
    student, teacher = rollout
    weights = {kind: importance_weights(*rollout, alpha, mask, kind) for kind in ("token", "prefix", "exact")}
    for row, length in enumerate(LENGTHS):
        product = 1.0
        for t in range(length):
            q, p = math.exp(student[row, t]), math.exp(teacher[row, t])
            ratio = q / (alpha * p + (1 - alpha) * q)
            assert weights["exact"][row, t].item() == pytest.approx(product, rel=1e-5)
            product *= ratio
            assert weights["token"][row, t].item() == pytest.approx(ratio, rel=1e-5)
            assert weights["prefix"][row, t].item() == pytest.approx(product, rel=1e-5)
    assert all((weight[~mask] == 0).all() for weight in weights.values())


@pytest.mark.parametrize("kind", ["token", "prefix", "exact"])
def test_without_a_teacher_in_the_sampler_every_weight_is_one(kind, rollout, mask):
    assert torch.equal(importance_weights(*rollout, 0.0, mask, kind), mask.float())


def test_weights_of_tokens_that_one_model_cannot_say_are_finite():
    student, teacher = torch.tensor([[-math.inf, -1.0, -1.0]]), torch.tensor([[-1.0, -math.inf, -1.0]])
    weights = importance_weights(student, teacher, 0.2, torch.ones(1, 3), "token")
    torch.testing.assert_close(weights, torch.tensor([[0.0, 1.25, 1.0]]))


def test_products_over_long_texts_stay_finite():
    student = torch.zeros(1, 2000)
    weights = importance_weights(student, student - 50, 0.5, torch.ones(1, 2000), "prefix")
    assert weights.isfinite().all()


def test_decision_weights_put_each_product_where_it_belongs(rollout, mask):
    token, prefix, before = (importance_weights(*rollout, 0.3, mask, kind) for kind in ("token", "prefix", "exact"))
    ones = mask.float()
    expected = {"token": (ones, token, token), "prefix": (ones, prefix, prefix), "exact": (prefix, ones, before)}
    for kind, weights in expected.items():
        for given, wanted in zip(decision_weights(*rollout, 0.3, mask, kind), weights, strict=True):
            assert torch.equal(given, wanted)


@pytest.mark.parametrize("advantage", [-2.0, 0.5])
@pytest.mark.parametrize("ratio", [0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0])
def test_the_surrogate_and_its_gradient_follow_ppo(advantage, ratio):
    logprobs = torch.tensor(math.log(ratio / 1.5) - 1).requires_grad_()
    arguments = torch.tensor(-1.0), torch.tensor(advantage), torch.tensor(1.5)
    loss = clipped_surrogate(logprobs, *arguments, 0.2)
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == pytest.approx(-min(advantage * ratio, advantage * min(max(ratio, 0.8), 1.2)), rel=1e-5)
    cut = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    assert grad.item() == pytest.approx(0 if cut else -advantage * ratio, rel=1e-5)
    assert is_clipped(logprobs, *arguments, 0.2).item() is cut


def test_without_a_clip_range_nothing_is_clipped(rollout):
    arguments = rollout[0], rollout[1], torch.ones(4, 6), torch.full((4, 6), 2.0), None
    torch.testing.assert_close(clipped_surrogate(*arguments), -2 * (rollout[0] - rollout[1]).exp())
    assert not is_clipped(*arguments).any()


def test_no_gradient_leaves_rewards_returns_weights_or_advantages(rollout, mask):
    student, teacher = (x.clone().requires_grad_() for x in rollout)
    advantages = standardize(reward_to_go(teacher - student, mask), mask)
    weights = decision_weights(student, teacher, 0.2, mask, "exact")
    assert not any(x.requires_grad for x in (advantages, *weights, reverse_kl_k1(student, teacher)))
    old, adv, weight = (torch.randn(4, 6).requires_grad_() for _ in range(3))
    clipped_surrogate(student, old, adv, weight).sum().backward()
    assert student.grad is not None
    assert [x.grad for x in (old, adv, weight)] == [None] * 3


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(rollout, mask):
    student = rollout[0].clone().requires_grad_()
    weights = decision_weights(student, rollout[0], 0.2, mask, "token")
    loss = clipped_surrogate(student, student.detach(), reward_to_go(rollout[0] - student, mask), weights.long)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (student.grad == 0).all()


def test_standardised_values_have_mean_zero_and_variance_one_over_the_kept_tokens(rollout, mask):
    values = standardize(rollout[0], mask)[mask]
    assert values.mean().item() == pytest.approx(0, abs=1e-6)
    assert values.var().item() == pytest.approx(1, rel=1e-5)


def test_standardising_as_the_reference_code_counts_the_zeros_of_the_padding(rollout, mask):
    padded = rollout[0] * mask
    expected = (padded - padded.mean()) / (padded.var() + 1e-8).sqrt()
    torch.testing.assert_close(standardize(rollout[0], mask, include_padding=True), expected * mask)


def test_a_single_value_standardises_to_zero():
    assert standardize(torch.tensor([[3.0, 9.0]]), torch.tensor([[1, 0]])).tolist() == [[0.0, 0.0]]


def test_rewards_are_scaled_then_clipped():
    rewards = torch.tensor([-9.0, -1.0, 0.25, 4.0])
    assert scale_and_clip_rewards(rewards, scale=0.5, clip=5.0).tolist() == [-5.0, -2.0, 0.5, 5.0]
    assert scale_and_clip_rewards(rewards, scale=0.5).tolist() == [-18.0, -2.0, 0.5, 8.0]


def test_both_kl_estimators_have_the_exact_mean_and_k3_is_never_negative():
    generator = torch.Generator().manual_seed(0)
    log_q, log_p = (torch.randn(50, 6, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    exact = (log_q.exp() * (log_q - log_p)).sum(-1)
    for estimator in (reverse_kl_k1, reverse_kl_k3):
        torch.testing.assert_close((log_q.exp() * estimator(log_q, log_p)).sum(-1), exact)
    assert (reverse_kl_k3(log_q, log_p) >= 0).all()
    near = torch.linspace(-1e-3, 1e-3, 999)
    assert (reverse_kl_k3(near, torch.zeros(999)) >= 0).all()


def test_effective_sample_size_counts_equal_weights_whole_and_a_lone_weight_as_one():
    mask = torch.tensor([[1, 1, 1, 0]])
    assert effective_sample_size(torch.full((1, 4), 0.3), mask).item() == pytest.approx(3)
    assert effective_sample_size(torch.tensor([[0.0, 7.0, 0.0, 9.0]]), mask).item() == pytest.approx(1)
    assert effective_sample_size(torch.zeros(1, 4), mask).item() == 0


def test_half_precision_is_widened_and_double_kept(rollout, mask):
    half = [x.bfloat16() for x in rollout]
    assert torch.equal(reward_to_go(half[0], mask), reward_to_go(half[0].float(), mask))
    assert importance_weights(*half, 0.2, mask).dtype == torch.float32
    assert reward_to_go(rollout[0].double(), mask).dtype == torch.float64


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reward_to_go(ONES, ONES, gamma=1.5), "gamma: .*1.5"),
        (lambda: reward_to_go(ONES, ONES[:, :2]), r"rewards \[2, 3\], mask \[2, 2\]"),
        (lambda: importance_weights(ONES, ONES, 1.2, ONES), "alpha: .*1.2"),
        (lambda: importance_weights(ONES, ONES, 0.2, ONES, "sequence"), "importance_weight: .*'sequence'"),
        (lambda: clipped_surrogate(ONES, ONES, ONES, ONES, 0.0), "clip_range: .*0.0"),
        (lambda: clipped_surrogate(ONES, ONES[0], ONES, ONES), r"old_logprobs \[3\]"),
        (lambda: scale_and_clip_rewards(ONES, scale=0), "reward_scale: .*0"),
        (lambda: scale_and_clip_rewards(ONES, clip=-1), "reward_clip: .*-1"),
    ],
)
def test_an_argument_outside_its_range_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_standardizing_shares_of_a_batch_with_global_sums_is_standardizing_the_batch():
    values, mask = torch.randn(6, 5), torch.rand(6, 5) < 0.7
    whole = standardize(values, mask)
    kept = values[mask].double()
    sums = iter([torch.stack([torch.tensor(float(len(kept)), dtype=torch.float64), kept.sum()])] * 1)
    squares = (kept - kept.mean()).square().sum()[None]

    def over_ranks(here):
        return next(sums, squares)

    share = standardize(values[:2], mask[:2], sum_over_ranks=over_ranks)
    torch.testing.assert_close(share, whole[:2], rtol=1e-6, atol=1e-6)
