"""What the reference implementations of MiniLLM and DPKD compute from recorded inputs, to 1e-5.

``LIT_DISTILL_FIXTURES`` names another folder of the same form: a manifest.json and one safetensors file per entry.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lit_distill.functional import (
    clipped_surrogate,
    importance_weights,
    reverse_kl,
    reverse_kl_k3,
    reward_to_go,
    scale_and_clip_rewards,
    soft_cross_entropy,
    standardize,
    token_preference_loss,
)

FOLDER = Path(os.environ.get("LIT_DISTILL_FIXTURES") or Path(__file__).parent / "fixtures" / "reference")
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())
IGNORED = -100
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def entries(prefix):
    names = [name for name in MANIFEST if name.startswith(prefix)]
    return pytest.mark.parametrize("name", names)


def load(name):
    return load_file(FOLDER / f"{name}.safetensors"), MANIFEST[name]


def through_first_eos(response, eos_id):
    ended_before = (response == eos_id).long().cumsum(1).roll(1, dims=1)
    ended_before[:, 0] = 0
    return ended_before == 0


def response_logprobs(logits, data):
    num_prompt, tokens = data["query"].shape[1], data["response"]
    rows = logits[:, num_prompt - 1 : num_prompt - 1 + tokens.shape[1]]
    return rows, rows.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


@entries("minillm_")
def test_minillm_scores_a_rollout_as_the_reference_code(name):
    data, config = load(name)
    mask = through_first_eos(data["response"], config["eos_id"])
    old_logprobs = response_logprobs(data["student_logits_rollout"], data)[1]
    teacher_logprobs = response_logprobs(data["teacher_logits"], data)[1]
    rewards = scale_and_clip_rewards(teacher_logprobs - old_logprobs, config["reward_scaling"], config["reward_clip"])
    returns = reward_to_go(rewards, mask, gamma=config["gamma"], include_current=True)
    computed = {
        "old_logprobs": old_logprobs,
        "teacher_logprobs": teacher_logprobs,
        "rewards": rewards,
        "importance_weights": importance_weights(old_logprobs, teacher_logprobs, config["alpha"], mask),
        "advantages": standardize(returns, mask, include_padding=True),
        "rev_kl_k3": reverse_kl_k3(old_logprobs, teacher_logprobs),
    }
    assert torch.equal(mask.long(), data["mask"])
    for field, values in computed.items():
        close(values[mask], data[field][mask], msg=lambda text, field=field: f"{field}: {text}")


@entries("minillm_")
def test_minillm_loss_and_gradient_are_those_of_the_reference_code(name):
    data, config = load(name)
    mask = data["mask"].bool()
    student_logits = data["student_logits_now"].requires_grad_()
    student_rows, logprobs = response_logprobs(student_logits, data)
    teacher_rows = response_logprobs(data["teacher_logits"], data)[0]
    surrogate = clipped_surrogate(
        logprobs, data["old_logprobs"], data["advantages"], data["importance_weights"], config["clip_eps"]
    )
    policy_gradient = surrogate[mask].mean()
    single_step = reverse_kl(student_rows, teacher_rows)[mask].mean()
    loss = policy_gradient + single_step if config["single_step"] else policy_gradient
    close(policy_gradient.item(), config["pg_loss"])
    close(single_step.item(), config["reg_loss"])
    close(loss.item(), config["total"])
    close(loss, data["loss"])
    close(torch.autograd.grad(loss, student_logits)[0], data["grad_student_logits"])


@entries("dpkd_token_")
def test_token_level_dpkd_is_that_of_the_reference_code(name):
    data, config = load(name)
    student_logits = data["student_logits"].requires_grad_()
    options = {key: config[key] for key in ("variant", "beta", "label_smoothing", "dpop_lambda")}
    losses = token_preference_loss(student_logits, data["teacher_logits"], **options)
    loss = losses[data["labels"] != IGNORED].mean()
    close(loss, data["loss"])
    close(torch.autograd.grad(loss, student_logits)[0], data["grad_student_logits"])


@entries("soft_ce_")
def test_soft_cross_entropy_is_that_of_the_reference_code(name):
    data, _ = load(name)
    student_logits = data["student_logits"].requires_grad_()
    loss = soft_cross_entropy(student_logits, data["teacher_logits"])[data["labels"] != IGNORED].mean()
    close(loss, data["loss"])
    close(torch.autograd.grad(loss, student_logits)[0], data["grad_student_logits"])
    close(
        F.cross_entropy(student_logits.flatten(0, 1), data["labels"].flatten(), ignore_index=IGNORED), data["lm_loss"]
    )


def test_every_entry_of_the_manifest_belongs_to_a_test_and_has_its_file():
    kinds = ("minillm_", "dpkd_token_", "soft_ce_")
    assert MANIFEST
    assert [name for name in MANIFEST if not name.startswith(kinds)] == []
    assert [name for name in MANIFEST if not (FOLDER / f"{name}.safetensors").is_file()] == []
