r"""Importance weights that correct for the teacher's share of a teacher-mixed sampler, p̃ = αp + (1−α)q.

MiniLLM's equation has Π_{≤t} q/p̃; in practice it uses w_t of one token. Neither makes the Long term unbiased, because R_{t+1}
contains rewards of tokens sampled from p̃ after t. Our per-decision weights (`exact`) do: Π_{≤t'} w on every reward r_t', and
Π_{<t} w on the Single term of position t. `decision_weights` returns all of them.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.functional.masking import check_shapes, masked_fill_outside

WeightKind = Literal["token", "prefix", "exact"]

MAX_LOG_WEIGHT = 80.0  # products of weights are limited to e^80, which float32 can represent


class DecisionWeights(NamedTuple):
    """The importance weights of one kind for each place where they are used; three ``[B, T]``, without gradient."""

    rewards: Tensor
    """Multiply every reward before `reward_to_go`."""
    long: Tensor
    """``importance_weights`` of `clipped_surrogate`."""
    single: Tensor
    """Multiply the reverse KL of every position."""


@torch.no_grad()
def importance_weights(
    student_logprobs: Tensor, teacher_logprobs: Tensor, alpha: float, mask: Tensor, kind: WeightKind = "token"
) -> Tensor:
    r"""Weights that correct for the teacher's share of the sampler, from w_t = q(y_t)/p̃(y_t), 0 <= w_t <= 1/(1 - alpha).

    - ``token``: w_t. Mean 1 after every prefix and low variance; biased, since prefixes still come from p̃.
    - ``prefix``: Π_{s<=t} w_s. Unbiased for terms that depend on token t and its prefix (Single); biased for Long.
    - ``exact``: Π_{s<t} w_s. Unbiased for terms that depend on the prefix alone: Single, with less variance than ``prefix``.
      The exact Long term needs weights on its rewards instead: see `decision_weights`.

    With alpha = 0 every weight is exactly 1.

    Args:
        student_logprobs: ``[B, T]`` log q of the sampled tokens at sampling time, at the sampling temperature.
        teacher_logprobs: ``[B, T]`` log p of the same tokens at the same temperature.
        alpha: share of the teacher in the sampler, in [0, 1].
        mask: ``[B, T]`` 1 for the tokens of the response, first EOS included.
        kind: ``token``, ``prefix`` or ``exact``.

    Returns:
        ``[B, T]`` >= 0; 0 where the mask is 0.

    Raises:
        ValueError: if alpha is outside [0, 1], the kind is unknown or the shapes differ.

    Source: MiniLLM, https://arxiv.org/abs/2306.08543; per-decision weights: Precup et al. 2000.
    """
    check_shapes(student_logprobs=student_logprobs, teacher_logprobs=teacher_logprobs, mask=mask)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected the teacher's share of the sampler, in [0, 1], got {alpha}.")
    if kind not in ("token", "prefix", "exact"):
        raise ValueError(f"importance_weight: expected token, prefix or exact, got {kind!r}.")
    kept = mask.bool()
    student, teacher = masked_fill_outside(student_logprobs, kept), masked_fill_outside(teacher_logprobs, kept)
    if alpha == 0:
        log_weights = torch.zeros_like(student)
    elif alpha == 1:
        log_weights = student - teacher
    else:
        log_weights = student - torch.logaddexp(teacher + math.log(alpha), student + math.log1p(-alpha))
    if kind == "prefix":
        log_weights = log_weights.cumsum(1)
    elif kind == "exact":
        log_weights = F.pad(log_weights.cumsum(1), (1, 0))[:, :-1]
    return masked_fill_outside(log_weights.clamp(max=MAX_LOG_WEIGHT).exp(), kept)


def decision_weights(
    student_logprobs: Tensor, teacher_logprobs: Tensor, alpha: float, mask: Tensor, kind: WeightKind = "token"
) -> DecisionWeights:
    r"""All importance weights of MiniLLM's gradient for one kind of weight.

    | kind | each reward | Long | Single | mean gradient |
    |---|---|---|---|---|
    | `token` (paper's practice) | 1 | w_t | w_t | biased |
    | `prefix` (paper's equation) | 1 | Π_{<=t} | Π_{<=t} | Single exact, Long biased |
    | `exact` | Π_{<=t} | 1 | Π_{<t} | exact, but higher variance |

    Since `exact` leaves the ratio at 1, clipping does not touch the first inner epoch.

    Args:
        student_logprobs: ``[B, T]`` log q of the sampled tokens under the student that sampled.
        teacher_logprobs: ``[B, T]`` log p of the same tokens.
        alpha: share of the teacher in the sampler, in [0, 1].
        mask: ``[B, T]`` 1 for the tokens of the response.
        kind: ``token``, ``prefix`` or ``exact``.

    Returns:
        Three ``[B, T]``; 0 where the mask is 0.

    Raises:
        ValueError: as `importance_weights`.
    """
    weights = importance_weights(student_logprobs, teacher_logprobs, alpha, mask, kind)
    ones = mask.to(weights.dtype)
    if kind == "exact":
        on_rewards = importance_weights(student_logprobs, teacher_logprobs, alpha, mask, "prefix")
        return DecisionWeights(rewards=on_rewards, long=ones, single=weights)
    return DecisionWeights(rewards=ones, long=weights, single=weights)


@torch.no_grad()
def effective_sample_size(weights: Tensor, mask: Tensor) -> Tensor:
    r"""Kish's (Σw)²/Σw²: how many equally weighted tokens would be as informative.

    Args:
        weights: ``[B, T]`` importance weights, >= 0.
        mask: ``[B, T]`` 1 for the tokens that count.

    Returns:
        ``[]`` between 1 and the number of counted tokens; 0 if none has weight.

    Raises:
        ValueError: if the shapes differ.
    """
    check_shapes(weights=weights, mask=mask)
    counted = masked_fill_outside(weights, mask.bool()).double()
    squares = counted.square().sum()
    return torch.where(squares > 0, counted.sum().square() / squares, squares).float()
