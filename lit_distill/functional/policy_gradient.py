r"""MiniLLM's policy gradient: returns, importance weights, the clipped surrogate, and estimators to monitor.

Student q, teacher p, sampler p̃ = αp + (1−α)q, reward r_t = log p(y_t) − log q(y_t), and the exact gradient
∇KL(q‖p) = Single + Long, Long = −E Σ_t R_{t+1} ∇log q(y_t), R_{t+1} = Σ_{t'>t} r_t'.

Everything is ``[B, T]`` over the tokens of responses. Results at positions with mask 0 are 0. The inputs there, and
their number, do not change any bit of the other results. Rewards, returns and weights are constants, without gradient.
float64 stays float64, everything else is computed in float32.

| | MiniLLM (paper) | reference code | here |
|---|---|---|---|
| return | R_{t+1} | R_t: r_t is counted twice, here and in Single | `include_current`; False is the paper |
| discount | 1 | 0.95 | `gamma`, counted from the first reward of the sum, over tokens inside the mask only |
| length norm | divisor T−t−1, off by one | tokens from t on | number of rewards in the sum; the empty sum is 0 |
| advantages | as they are | whitened over the padded batch | `standardize`; `include_padding` is the code |
| weight | exact Π_{≤t} w, used: w_t | w_t, on Long alone | `decision_weights`: `token`, `prefix`, `exact` |
| ratio | q_new/p̃, clipped around 1 | exp(log q_new − log q_old)·w_t | `clipped_surrogate`: the same number |
| reward | r_t | r_t/0.5, clipped to ±100 | `scale_and_clip_rewards` |

Source: MiniLLM, https://arxiv.org/abs/2306.08543.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_distill.functional.importance import (
    DecisionWeights,
    WeightKind,
    decision_weights,
    effective_sample_size,
    importance_weights,
)
from lit_distill.functional.masking import check_shapes, masked_fill_outside, upcast

__all__ = [
    "DecisionWeights",
    "WeightKind",
    "clipped_surrogate",
    "decision_weights",
    "effective_sample_size",
    "importance_weights",
    "is_clipped",
    "reverse_kl_k1",
    "reverse_kl_k3",
    "reward_to_go",
    "scale_and_clip_rewards",
    "standardize",
]


@torch.no_grad()
def reward_to_go(
    rewards: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    include_current: bool = False,
    length_normalize: bool = True,
) -> Tensor:
    r"""Discounted sum, or mean, of the rewards that follow each token: the advantage of the Long term.

    Unbiased for Long with gamma 1, without length normalisation and current reward, if tokens are sampled from the
    student or the rewards carry `exact` weights. ``gamma`` < 1 and ``length_normalize`` trade bias for variance;
    ``include_current`` counts r_t a second time beside the Single term, so the sum of both has mean ∇KL + Single.

    Args:
        rewards: ``[B, T]`` nats, one per token.
        mask: ``[B, T]`` 1 for the tokens of the response, first EOS included.
        gamma: discount per token inside the mask, in [0, 1]; the first reward of each sum is not discounted.
        include_current: sum from t (reference code) rather than from t + 1 (paper).
        length_normalize: divide by the number of rewards in the sum.

    Returns:
        ``[B, T]``; 0 for the empty sum and where the mask is 0.

    Raises:
        ValueError: if gamma is outside [0, 1] or the shapes differ.
    """
    check_shapes(rewards=rewards, mask=mask)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma: expected a discount in [0, 1], got {gamma}.")
    kept = mask.bool()
    rewards = masked_fill_outside(rewards, kept)
    running = torch.zeros_like(rewards[:, 0]) if rewards.shape[1] else rewards.new_zeros(len(rewards))
    columns = []
    # From the right, one column at a time: the order of additions is the same for every amount of padding.
    for reward, here in zip(reversed(rewards.unbind(1)), reversed(kept.unbind(1)), strict=True):
        following = running
        running = torch.where(here, reward + gamma * running, running)
        columns.append(running if include_current else following)
    returns = torch.stack(columns[::-1], dim=1) if columns else rewards
    if length_normalize:
        num_rewards = kept.flip(1).cumsum(1).flip(1) - (0 if include_current else kept.long())
        returns = returns / num_rewards.clamp(min=1)
    return masked_fill_outside(returns, kept)


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    importance_weights: Tensor,
    clip_range: float | None = 0.2,
) -> Tensor:
    r"""Per-token loss -min(A ρ, A clip(ρ, 1 - ε, 1 + ε)) with ρ = exp(log q_new - log q_old) w: the Long term.

    Its gradient is -A ρ ∇log q_new, hence -A w ∇log q at the first inner epoch, and 0 where clipping is active.
    Clipping biases it; `token` and `prefix` weights outside 1 ± ε are clipped already at the first inner epoch.

    Args:
        logprobs: ``[...]`` log q of the sampled tokens now; receives the gradient.
        old_logprobs: ``[...]`` the same at sampling time.
        advantages: ``[...]`` treated as constants.
        importance_weights: ``[...]`` ``long`` of `decision_weights`; treated as constants.
        clip_range: ε > 0, or None for no clipping.

    Returns:
        ``[...]`` loss to minimise. The caller has to drop positions outside the mask.

    Raises:
        ValueError: if clip_range is not > 0 or the shapes differ.
    """
    ratio = _ratio(logprobs, old_logprobs, advantages, importance_weights, clip_range)
    advantages = upcast(advantages).detach()
    if clip_range is None:
        return -advantages * ratio
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


@torch.no_grad()
def is_clipped(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    importance_weights: Tensor,
    clip_range: float | None = 0.2,
) -> Tensor:
    """``[...]`` bool: the tokens whose gradient is 0 by clipping in `clipped_surrogate`; same arguments and errors."""
    ratio = _ratio(logprobs, old_logprobs, advantages, importance_weights, clip_range)
    if clip_range is None:
        return torch.zeros_like(ratio, dtype=torch.bool)
    return torch.where(advantages > 0, ratio > 1 + clip_range, (ratio < 1 - clip_range) & (advantages < 0))


@torch.no_grad()
def scale_and_clip_rewards(rewards: Tensor, scale: float = 1.0, clip: float | None = None) -> Tensor:
    r"""Rewards divided by ``scale``, then limited to ± ``clip``.

    The scale changes the weight of Long against Single; clipping biases the gradient where it is active.

    Args:
        rewards: ``[...]`` nats.
        scale: divisor > 0; the reference code uses 0.5.
        clip: limit > 0 after scaling, or None; the reference code uses 100.

    Returns:
        ``[...]``.

    Raises:
        ValueError: if the scale or the clip is not > 0.
    """
    if not scale > 0:
        raise ValueError(f"reward_scale: expected a divisor > 0, got {scale}.")
    if clip is not None and not clip > 0:
        raise ValueError(f"reward_clip: expected a limit > 0 or null, got {clip}.")
    scaled = upcast(rewards) / scale
    return scaled if clip is None else scaled.clamp(-clip, clip)


@torch.no_grad()
def standardize(
    values: Tensor,
    mask: Tensor,
    *,
    include_padding: bool = False,
    eps: float = 1e-8,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""Values shifted and scaled to mean 0 and variance 1 over the batch.

    Biases the policy gradient: the shift and the scale depend on the sampled rewards themselves.

    Args:
        values: ``[B, T]``.
        mask: ``[B, T]`` 1 for the tokens that count.
        include_padding: take the mean and the variance over all B·T positions with zeros in the padding, as the
            reference code does; then the amount of padding changes the result.
        eps: added to the variance.
        sum_over_ranks: sums a ``[n]`` tensor over all ranks, for mean and variance over all ranks; by default over this
            rank only.

    Returns:
        ``[B, T]``; 0 where the mask is 0, and everywhere if fewer than two values count.

    Raises:
        ValueError: if the shapes differ.
    """
    check_shapes(values=values, mask=mask)
    kept = mask.bool()
    values = masked_fill_outside(values, kept)
    counted = (
        values.flatten() if include_padding else values[kept]
    )  # flat: padding does not change the order of the sum
    total = sum_over_ranks or (lambda sums: sums)
    wide = counted.double()
    count, first = total(torch.stack([wide.new_tensor(float(wide.numel())), wide.sum()]))
    mean = first / count.clamp(min=1)
    (squares,) = total((wide - mean).square().sum()[None])
    variance = squares / (count - 1).clamp(min=1)
    standardized = (values - mean.to(values.dtype)) * torch.rsqrt(variance + eps).to(values.dtype)
    return masked_fill_outside(torch.where(count >= 2, standardized, torch.zeros_like(values)), kept)


@torch.no_grad()
def reverse_kl_k1(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    r"""Per-token estimate log q(y_t) - log p(y_t) of KL(q‖p); its negative is MiniLLM's reward.

    Unbiased for tokens sampled from the student; may be negative. With a teacher-mixed sampler it is biased unless weighted
    by ``prefix`` importance weights.

    Args:
        student_logprobs: ``[...]`` log q of the sampled tokens.
        teacher_logprobs: ``[...]`` log p of the same tokens.

    Returns:
        ``[...]`` nats.

    Source: http://joschu.net/blog/kl-approx.html.
    """
    return upcast(student_logprobs) - upcast(teacher_logprobs)


@torch.no_grad()
def reverse_kl_k3(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    r"""Per-token estimate p/q - 1 - log(p/q) of KL(q‖p): never negative, and usually of lower variance than k1.

    Unbiased for tokens sampled from the student if q > 0 wherever p > 0; otherwise biased like `reverse_kl_k1`.

    Args:
        student_logprobs: ``[...]`` log q of the sampled tokens.
        teacher_logprobs: ``[...]`` log p of the same tokens.

    Returns:
        ``[...]`` nats, >= 0.

    Source: http://joschu.net/blog/kl-approx.html.
    """
    log_ratio = upcast(teacher_logprobs) - upcast(student_logprobs)
    return (torch.expm1(log_ratio) - log_ratio).clamp(min=0)


def _ratio(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, importance_weights: Tensor, clip_range: float | None
) -> Tensor:
    """ρ, differentiable by ``logprobs``."""
    check_shapes(
        logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, importance_weights=importance_weights
    )
    if clip_range is not None and not clip_range > 0:
        raise ValueError(f"clip_range: expected a number > 0, or null for no clipping, got {clip_range}.")
    return torch.exp(upcast(logprobs) - upcast(old_logprobs).detach()) * upcast(importance_weights).detach()
