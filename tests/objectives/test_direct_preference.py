"""Preference of whole texts as an objective: what it needs, what it says of the pairs, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from lit_distill.functional import direct_preference_loss
from lit_distill.objectives import PAIR_SIGNALS, DirectPreference, NextToken, Objective, check_needs

OF_PAIRS = {"student_logits", "labels", *(name for name in PAIR_SIGNALS if not name.startswith("teacher"))}


def signals(pairs: int = 5, length: int = 6) -> dict[str, torch.Tensor]:
    masks = {name: torch.arange(length) < torch.randint(1, length + 1, (pairs, 1)) for name in ("chosen", "rejected")}
    logprobs = {
        f"{who}_{role}_logprobs": -torch.rand(pairs, length) * mask
        for role, mask in masks.items()
        for who in ("student", "teacher")
    }
    return logprobs | {f"{role}_mask": mask for role, mask in masks.items()}


def test_it_sums_over_tokens_and_pairs_and_says_what_it_compares() -> None:
    given = signals()
    term = DirectPreference(beta=0.5)(**given)
    q_t, q_s, p_t, p_s = (
        given[f"{who}_{role}_logprobs"].sum(-1) for who in ("student", "teacher") for role in ("chosen", "rejected")
    )
    n_t, n_s = given["chosen_mask"].sum(-1), given["rejected_mask"].sum(-1)
    torch.testing.assert_close(term.total, direct_preference_loss(q_t, q_s, p_t, p_s, n_t, n_s, beta=0.5).sum())
    assert term.count == 5
    rewards = [0.5 * (q - p) / n for q, p, n in ((q_t, p_t, n_t), (q_s, p_s, n_s))]
    assert float(term.metrics["margin"]) == pytest.approx(float((rewards[0] - rewards[1]).sum()), rel=1e-5)
    assert float(term.metrics["accuracy"]) == sum(
        a > b for a, b in zip(*map(torch.Tensor.tolist, rewards), strict=True)
    )
    assert float(term.metrics["rejected_logprob"]) == pytest.approx(float((q_s / n_s).sum()), rel=1e-5)
    torch.testing.assert_close(term.metrics["reward_chosen"] - term.metrics["reward_rejected"], term.metrics["margin"])


def test_where_student_and_teacher_agree_it_is_log_two() -> None:
    given = signals()
    given |= {f"teacher_{role}_logprobs": given[f"student_{role}_logprobs"] for role in ("chosen", "rejected")}
    assert float(DirectPreference()(**given).total) == pytest.approx(5 * math.log(2))


@pytest.mark.parametrize("variant", ["cpo", "simpo", "reference_free"])
def test_variants_that_do_not_ask_the_teacher_do_not_need_one(variant: str) -> None:
    objective = DirectPreference(variant=variant)
    check_needs({"x": objective}, OF_PAIRS, "model.objectives", "the source ResponsePairs")
    given = {name: value for name, value in signals().items() if not name.startswith("teacher")}
    assert math.isfinite(float(objective(**given).total))


def test_what_is_missing_is_named_with_what_to_do() -> None:
    objectives = {"dpkd": DirectPreference()}
    with pytest.raises(ValueError, match=r"model\.objectives\.dpkd: .*there is no teacher\. Set model\.teacher\.path"):
        check_needs(objectives, OF_PAIRS, "model.objectives", "the source ResponsePairs")
    with pytest.raises(
        ValueError, match=r"works on pairs, but the source DatasetResponses provides single responses.*ResponsePairs"
    ):
        check_needs(
            objectives,
            {"student_logits", "labels", "teacher_logits"},
            "model.objectives",
            "the source DatasetResponses",
        )
    check_needs({"ce": NextToken()}, OF_PAIRS, "model.objectives", "the source ResponsePairs")


def test_tokens_and_pairs_are_not_for_one_objective() -> None:
    class Both(Objective):
        def forward(self, student_logits, chosen_mask): ...

    with pytest.raises(ValueError, match=r"model\.objectives\.b: Both needs signals of pairs and of tokens at once"):
        check_needs({"b": Both()}, OF_PAIRS, "model.objectives", "the source X")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": 0.0}, "beta"),
        ({"variant": "dpo2"}, "variant"),
        ({"label_smoothing": 0.7}, "label_smoothing"),
        ({"variant": "simpo", "length_normalize": False}, "length_normalize"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DirectPreference(**setting)
