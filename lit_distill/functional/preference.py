r"""Preference losses: the teacher's response y_t ("chosen") over the student's y_s ("rejected").

Student q, teacher p, h = log q(y_t)/p(y_t) − log q(y_s)/p(y_s), each part divided by its length if normalised. The signs
are derived here: the student's implicit reward is β log(q/p) + const, so the loss must fall as h grows, and the gradient of
−log σ(βh) carries the weight σ(−βh) = σ(r̂_s − r̂_t). Two methods share the name DPKD:

| | DPKD (paper) | released code | here |
|---|---|---|---|
| y_t, y_s | whole responses of teacher and student | argmax of teacher and student at every position of the data | both |
| function | | | `direct_preference_loss` [B] · `token_preference_loss` [..., V] |
| gradient weight | printed with the wrong sign | right | right, by derivation |
| `dpkd` | −log σ(βh), lengths divided out | −log σ(βh) | the same; `dpo` is another name of the token form |
| `ipo` | (h − 1/(2β))² | same | same |
| `cpo` | no teacher, plus NLL of y_t | absent | −log σ(β log q(y_t)/q(y_s)) − λ log q(y_t) |
| `simpo` | no teacher, per-token means, target margin γ | token loss / (unrepeated length / 256) | both |
| `dpop` | −log σ(βh − βλ max(0, log p/q(y_t))) | −log σ(βh) + λ max(0, log p/q(y_t)) | both |
| `reference_free` | teacher ratio 0 | same | same |
| `teacher_margin` | absent | absent | −log σ(β log q(y_t)/q(y_s) − α max(0, log p(y_t)/p(y_s))) |

`teacher_margin` is DPO with an offset, without its reference model: the more the teacher prefers y_t, the larger the lead of y_t
that the student is asked for. Biased towards a flatter student: the max makes its mean gradient at q = p not 0, as `dpkd`'s is.

Sources: DPKD https://arxiv.org/abs/2406.19774; DPO 2305.18290; IPO 2310.12036; CPO 2401.08417; SimPO 2405.14734;
DPO-Positive 2402.13228; DPO with an offset 2402.10571; PLaD 2406.02886; label smoothing as in conservative DPO,
https://ericmitchell.ai/cdpo.pdf.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.functional.distributions import check_same_vocabulary, finite_log_softmax
from lit_distill.functional.masking import check_shapes, upcast

PreferenceVariant = Literal["dpkd", "ipo", "cpo", "simpo", "dpop", "reference_free", "teacher_margin"]
TokenPreferenceVariant = Literal["dpkd", "dpo", "ipo", "dpop", "reference_free", "simpo"]

WITHOUT_TEACHER = ("cpo", "simpo", "reference_free")
SIMPO_LENGTH = 256  # length unit of the released code


def direct_preference_loss(
    student_chosen: Tensor,
    student_rejected: Tensor,
    teacher_chosen: Tensor,
    teacher_rejected: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
    variant: PreferenceVariant = "dpkd",
    length_normalize: bool = True,
    label_smoothing: float = 0.0,
    target_margin: float = 0.5,
    dpop_lambda: float = 50.0,
    cpo_nll_weight: float = 1.0,
    teacher_margin: float = 0.1,
) -> Tensor:
    r"""Per-pair loss that prefers the teacher's response over the student's: DPKD and its variants.

    The preference alone lowers log q(y_s) without bound: log it, and add `NextToken` on y_t and the corpus loss.

    Args:
        student_chosen: ``[B]`` log q(y_t), summed over the response; receives the gradient.
        student_rejected: ``[B]`` log q(y_s), summed; receives the gradient.
        teacher_chosen: ``[B]`` log p(y_t), summed; treated as constant.
        teacher_rejected: ``[B]`` log p(y_s), summed; treated as constant.
        chosen_lengths: ``[B]`` tokens of y_t, > 0.
        rejected_lengths: ``[B]`` tokens of y_s, > 0.
        beta: preference temperature, > 0.
        variant: ``cpo``, ``simpo`` and ``reference_free`` do not use the teacher.
        length_normalize: divide every log-probability by the length of its response. SimPO requires it.
        label_smoothing: probability in [0, 0.5] that the labels are swapped; 0 for ``ipo``, which has none.
        target_margin: SimPO's γ, in units of reward; used by ``simpo`` only.
        dpop_lambda: weight of the penalty if log q(y_t) is below log p(y_t); used by ``dpop`` only.
        cpo_nll_weight: weight of −log q(y_t); used by ``cpo`` only. Set 0 if `NextToken` on y_t is an objective too.
        teacher_margin: α >= 0; the loss asks β log q(y_t)/q(y_s) to exceed α log p(y_t)/p(y_s); used by ``teacher_margin`` only.
            With α = β the variant equals ``dpkd`` where the teacher prefers y_t. Where it prefers y_s the margin is 0.

    Returns:
        ``[B]`` nats (``ipo``: squared nats); log 2 at q = p for ``dpkd`` and ``dpop``.

    Raises:
        ValueError: if the variant is unknown, a number is outside its range or the shapes differ.

    Source: DPKD, https://arxiv.org/abs/2406.19774; the variants' papers at the top of this file.
    """
    _check(variant, PreferenceVariant, beta, label_smoothing, dpop_lambda)
    if not teacher_margin >= 0:
        raise ValueError(f"teacher_margin: expected 0 or more, got {teacher_margin}.")
    if variant == "simpo" and not length_normalize:
        raise ValueError("length_normalize: simpo needs per-token means. Set true, or choose variant reference_free.")
    check_shapes(
        student_chosen=student_chosen,
        student_rejected=student_rejected,
        teacher_chosen=teacher_chosen,
        teacher_rejected=teacher_rejected,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    per_chosen, per_rejected = (
        n.clamp(min=1) if length_normalize else torch.ones_like(n) for n in (chosen_lengths, rejected_lengths)
    )
    chosen, rejected = upcast(student_chosen) / per_chosen, upcast(student_rejected) / per_rejected
    chosen_ratio, rejected_ratio = chosen, rejected
    margin: Tensor | float = target_margin if variant == "simpo" else 0.0
    if variant not in WITHOUT_TEACHER:
        of_teacher = upcast(teacher_chosen).detach() / per_chosen, upcast(teacher_rejected).detach() / per_rejected
        if variant == "teacher_margin":
            margin = teacher_margin * F.relu(of_teacher[0] - of_teacher[1])
        else:
            chosen_ratio, rejected_ratio = chosen - of_teacher[0], rejected - of_teacher[1]
    difference = chosen_ratio - rejected_ratio
    if variant == "ipo":
        return (difference - 1 / (2 * beta)).square()
    if variant == "dpop":
        difference = difference - dpop_lambda * F.relu(-chosen_ratio)
    loss = _smoothed_preference(beta * difference - margin, label_smoothing)
    return loss - cpo_nll_weight * chosen if variant == "cpo" else loss


@torch.no_grad()
def implicit_reward(
    student_logprobs: Tensor, teacher_logprobs: Tensor, lengths: Tensor, beta: float, length_normalize: bool = True
) -> Tensor:
    r"""β log q(y)/p(y) per response, divided by its length if normalised; the preference compares these rewards.

    Args:
        student_logprobs: ``[B]`` log q(y), summed over the response.
        teacher_logprobs: ``[B]`` log p(y), summed.
        lengths: ``[B]`` tokens of y, > 0.
        beta: preference temperature, > 0.
        length_normalize: as given to `direct_preference_loss`.

    Returns:
        ``[B]`` nats. Chosen minus rejected is the margin; its sign is the preference's accuracy.
    """
    log_ratio = upcast(student_logprobs) - upcast(teacher_logprobs)
    return beta * (log_ratio / lengths.clamp(min=1) if length_normalize else log_ratio)


def token_preference_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.1,
    variant: TokenPreferenceVariant = "dpkd",
    label_smoothing: float = 0.0,
    dpop_lambda: float = 50.0,
    lengths: Tensor | None = None,
) -> Tensor:
    r"""Per-token preference of the teacher's most probable token over the student's: the method of the released DPKD code.

    Nothing is generated. ``dpkd`` is >= log 2. Where both models have the same top token it is log 2, with gradient 0.

    Args:
        student_logits: ``[..., V]`` scores of the student; receives the gradient.
        teacher_logits: ``[..., V]`` scores of the teacher; treated as constant.
        beta: preference temperature, > 0.
        variant: ``dpo`` is the released code's name for ``dpkd``.
        label_smoothing: probability in [0, 0.5] that the labels are swapped; 0 for ``ipo``, which has none.
        dpop_lambda: weight of the penalty if log q(y_t) is below log p(y_t); used by ``dpop`` only.
        lengths: ``[...]`` or broadcastable to it: number of tokens of the response of each position, the divisor of
            ``simpo``. None needs logits of whole responses ``[B, S, V]`` and counts with `unrepeated_length`.

    Returns:
        ``[...]`` float32 nats (``ipo``: squared nats).

    Raises:
        ValueError: if the variant is unknown, a number is outside its range, the shapes differ or ``simpo`` has neither
            lengths nor whole responses.

    Source: microsoft/LMOps, dpkd; the tests compare with recorded inputs and outputs of that code.
    """
    _check(variant, TokenPreferenceVariant, beta, label_smoothing, dpop_lambda)
    check_same_vocabulary(student_logits, teacher_logits)
    student, teacher = student_logits.float(), teacher_logits.detach().float()
    favourite, rival = teacher.argmax(-1, keepdim=True), student.argmax(-1, keepdim=True)
    difference = _gap(student, favourite, rival)  # equals that of log-probabilities: the normaliser cancels
    if variant != "reference_free":
        difference = difference - _gap(teacher, favourite, rival)
    if variant == "ipo":
        return (difference - 1 / (2 * beta)).square()
    loss = _smoothed_preference(beta * difference, label_smoothing)
    if variant == "dpop":
        log_p, log_q = (finite_log_softmax(x, 1.0).gather(-1, favourite).squeeze(-1) for x in (teacher, student))
        loss = loss + dpop_lambda * F.relu(log_p - log_q)
    if variant == "simpo":
        if lengths is None:
            if student.dim() < 3:
                raise ValueError(
                    "variant: simpo divides by the length of the whole response. Pass lengths, or logits [B, S, V]."
                )
            lengths = unrepeated_length(rival.squeeze(-1)).unsqueeze(-1)
        loss = loss * SIMPO_LENGTH / lengths
    return loss


@torch.no_grad()
def unrepeated_length(tokens: Tensor) -> Tensor:
    r"""Number of tokens before the repeated last token of a sequence, at least 1.

    Args:
        tokens: ``[..., S]`` ids, such as the student's argmax at every position.

    Returns:
        ``[...]`` int64.
    """
    changes = tokens[..., 1:] != tokens[..., :-1]
    positions = torch.arange(1, tokens.shape[-1], device=tokens.device)
    return F.pad(changes * positions, (0, 1), value=1).amax(-1)


def _smoothed_preference(reward_margin: Tensor, label_smoothing: float) -> Tensor:
    """-log σ(margin), mixed with the same for swapped labels."""
    loss = -F.logsigmoid(reward_margin)
    if label_smoothing:  # 0 times an infinite margin would be NaN
        loss = loss + label_smoothing * reward_margin  # since log σ(m) - log σ(-m) = m
    return loss


def _gap(logits: Tensor, favourite: Tensor, rival: Tensor) -> Tensor:
    return (logits.gather(-1, favourite) - logits.gather(-1, rival)).squeeze(-1)


def _check(variant: str, variants: object, beta: float, label_smoothing: float, dpop_lambda: float) -> None:
    known: tuple[str, ...] = get_args(variants)
    if variant not in known:
        raise ValueError(f"variant: expected one of {', '.join(known)}, got {variant!r}.")
    if not beta > 0:
        raise ValueError(f"beta: expected a preference temperature > 0, got {beta}.")
    if not dpop_lambda >= 0:
        raise ValueError(f"dpop_lambda: expected 0 or more, got {dpop_lambda}.")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing: expected a probability in [0, 0.5], got {label_smoothing}.")
    if variant == "ipo" and label_smoothing:
        raise ValueError(
            f"label_smoothing: expected 0 for variant ipo, got {label_smoothing}. Set 0, or choose another variant."
        )
