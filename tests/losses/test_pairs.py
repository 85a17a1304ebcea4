"""Objectives on pairs of texts: the plain computation's value and gradients, whatever the chunks, padding and micro-batches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import ragged_text
from torch import Tensor, nn

from lit_distill.functional import direct_preference_loss, forward_kl
from lit_distill.losses import ObjectiveEvaluator
from lit_distill.models import CausalLM, LMHead
from lit_distill.objectives import DirectPreference, ForwardKL, LossTerm, NextToken, Objective
from lit_distill.teachers import FrozenTeacher
from lit_distill.types import Pairs, Sequences


def shifted(text: Sequences, by: int) -> Sequences:
    """The same texts behind padding on the left, as generated ones have it."""

    def pad(values: Tensor) -> Tensor:
        return F.pad(values, (by, 0))

    return Sequences(pad(text.input_ids), pad(text.attention_mask), pad(text.target_mask))


@pytest.fixture
def pairs() -> Pairs:
    return Pairs(ragged_text(4, 12), shifted(ragged_text(4, 9), 2))


def summed(logits: Tensor, text: Sequences) -> Tensor:
    """[B] log-probability of the targets."""
    logprobs = logits[:, :-1].float().log_softmax(-1).gather(-1, text.input_ids[:, 1:, None])[..., 0]
    return (logprobs * text.target_mask[:, 1:]).sum(dim=-1)


def plain(student: CausalLM, teacher: FrozenTeacher, pairs: Pairs, weights: dict[str, float]) -> Tensor:
    """The same losses from whole logits of each text alone."""

    def logits(lm: CausalLM, text: Sequences) -> Tensor:
        positions = (text.attention_mask.cumsum(-1) - 1).clamp(min=0)
        return lm.model(input_ids=text.input_ids, attention_mask=text.attention_mask, position_ids=positions).logits

    q, p = ([logits(lm, text) for text in (pairs.chosen, pairs.rejected)] for lm in (student, teacher.lm))
    sums = [
        summed(rows, text) for each in (q, p) for rows, text in zip(each, (pairs.chosen, pairs.rejected), strict=True)
    ]
    lengths = [text.target_mask.sum(dim=-1) for text in (pairs.chosen, pairs.rejected)]
    rows, labels = pairs.chosen.target_mask[:, 1:], pairs.chosen.input_ids[pairs.chosen.target_mask]
    q_rows, p_rows = q[0][:, :-1][rows], p[0][:, :-1][rows]
    return (
        weights["dpkd"] * direct_preference_loss(*sums, *lengths).sum()
        + weights["ce"] * F.cross_entropy(q_rows, labels, reduction="sum")
        + weights["kd"] * forward_kl(q_rows, p_rows).sum()
    )


WEIGHTS = {"dpkd": 0.5, "ce": 0.25, "kd": 0.125}


def measurement(
    student: CausalLM, teacher: FrozenTeacher | None, chunk_rows: int | None = None, **objectives: Objective
):
    chosen = objectives or {"dpkd": DirectPreference(), "ce": NextToken(), "kd": ForwardKL()}
    return ObjectiveEvaluator(chosen, student, teacher, "model.objectives", chunk_rows)


@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_value_and_gradients_are_those_of_whole_logits(student, teacher, pairs: Pairs, chunk_rows: int | None) -> None:
    expected = plain(student, teacher, pairs, WEIGHTS)
    gradients = torch.autograd.grad(expected, list(student.parameters()))
    loss, terms = measurement(student, teacher, chunk_rows)(pairs, WEIGHTS)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for parameter, gradient in zip(student.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    tokens = int(pairs.chosen.target_mask.sum())
    assert [terms[name].count for name in WEIGHTS] == [4, tokens, tokens]


def test_the_value_without_gradient_is_the_same(student, teacher, pairs: Pairs) -> None:
    loss, terms = measurement(student, teacher)(pairs, WEIGHTS)
    with torch.no_grad():
        quiet, others = measurement(student, teacher)(pairs, WEIGHTS)
    torch.testing.assert_close(quiet, loss.detach())
    assert {name: float(term.total) for name, term in terms.items()} == pytest.approx(
        {name: float(term.total) for name, term in others.items()}, rel=1e-6
    )


def test_micro_batches_add_up_to_the_whole(student, teacher, pairs: Pairs) -> None:
    measure = measurement(student, teacher)
    measure(pairs, WEIGHTS)[0].backward()
    whole = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    for start in (0, 3):
        measure(pairs.slice(start, start + 3), WEIGHTS)[0].backward()
    for parameter, gradient in zip(student.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    counts = measure.counts([pairs.slice(0, 3), pairs.slice(3, 4)], WEIGHTS)
    assert [int(counts[name]) for name in WEIGHTS] == [4, *[int(pairs.chosen.target_mask.sum())] * 2]


def test_a_pair_without_targets_counts_nowhere(student, teacher, pairs: Pairs) -> None:
    def hidden_from(row: int, text: Sequences) -> Sequences:
        mask = text.target_mask.clone()
        mask[row] = False
        return replace(text, target_mask=mask)

    dummy = Pairs(hidden_from(3, pairs.chosen), hidden_from(3, pairs.rejected))
    measure = measurement(student, teacher)
    without, with_dummy = (measure(text, WEIGHTS) for text in (pairs.slice(0, 3), dummy))
    torch.testing.assert_close(with_dummy[0], without[0])
    assert int(measure.counts([dummy], ["dpkd"])["dpkd"]) == with_dummy[1]["dpkd"].count == 3


def test_a_rank_of_dummies_says_zero_and_has_a_gradient_of_zero(student, teacher, pairs: Pairs) -> None:
    empty = Pairs(
        *(replace(text, target_mask=torch.zeros_like(text.target_mask)) for text in (pairs.chosen, pairs.rejected))
    )
    loss, terms = measurement(student, teacher)(empty, WEIGHTS)
    loss.backward()
    assert float(loss.detach()) == 0
    assert set(terms) == set(WEIGHTS)
    assert all(not parameter.grad.any() for parameter in student.parameters() if parameter.grad is not None)


@pytest.fixture
def work(monkeypatch) -> Counter:
    """Rows through each body and each head."""
    done: Counter = Counter()
    body, project = CausalLM.forward, LMHead.project

    def counted_body(self, input_ids, *args):
        done[f"body of {self.config.hidden_size}"] += 1
        return body(self, input_ids, *args)

    def counted_head(self, hidden):
        done[f"head of {hidden.shape[1]}"] += len(hidden)
        return project(self, hidden)

    monkeypatch.setattr(CausalLM, "forward", counted_body)
    monkeypatch.setattr(LMHead, "project", counted_head)
    return done


def rows(text: Sequences) -> int:
    return int(text.target_mask.sum())


def test_one_forward_of_each_model_two_projections_of_the_student_and_one_of_the_teacher(
    student, teacher, pairs: Pairs, work: Counter
) -> None:
    measurement(student, teacher, dpkd=DirectPreference(), ce=NextToken())(pairs, {"dpkd": 1.0, "ce": 1.0})
    both = rows(pairs.chosen) + rows(pairs.rejected)
    assert work == {"body of 16": 1, "body of 24": 1, "head of 16": 2 * both, "head of 24": both}


def test_a_teacher_that_has_scored_the_pairs_or_is_not_asked_does_not_run(student, teacher, pairs: Pairs, work) -> None:
    def scored(text: Sequences) -> Sequences:
        return replace(text, signals={"teacher_logprobs": -torch.rand(text.input_ids.shape)})

    measure = measurement(student, teacher, dpkd=DirectPreference())
    measure(Pairs(scored(pairs.chosen), scored(pairs.rejected)), {"dpkd": 1.0})
    measurement(student, None, simpo=DirectPreference(variant="simpo"))(pairs, {"simpo": 1.0})
    assert work["body of 24"] == work["head of 24"] == 0
    measurement(student, teacher)(pairs, {"ce": 1.0})  # without the pairs nobody reads the rejected texts
    assert work["head of 16"] == 4 * (rows(pairs.chosen) + rows(pairs.rejected)) + rows(pairs.chosen)


def test_scores_of_the_pairs_are_used_as_given(student, teacher, pairs: Pairs) -> None:
    expected, _ = measurement(student, teacher, dpkd=DirectPreference())(pairs, {"dpkd": 1.0})

    def scored(text: Sequences) -> Sequences:
        with torch.no_grad():
            logits = teacher(text.input_ids, text.attention_mask) @ teacher.head().weight.T
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, text.input_ids[:, 1:, None])[..., 0]
        return replace(text, signals={"teacher_logprobs": F.pad(logprobs, (1, 0))})

    given = Pairs(scored(pairs.chosen), scored(pairs.rejected))
    torch.testing.assert_close(
        measurement(student, teacher, dpkd=DirectPreference())(given, {"dpkd": 1.0})[0], expected
    )


class LearnedMargin(Objective):
    """An objective on pairs with a parameter and a count of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.margin = nn.Parameter(torch.tensor(0.3))

    def forward(self, student_chosen_logprobs: Tensor, student_rejected_logprobs: Tensor) -> LossTerm:
        gap = student_chosen_logprobs.sum(-1) - student_rejected_logprobs.sum(-1) - self.margin
        return LossTerm(F.relu(-gap).sum(), (gap < 0).sum())


def test_parameters_and_counts_of_a_users_own_objective_on_pairs_are_honoured(student, pairs: Pairs) -> None:
    objective = LearnedMargin()
    measure = measurement(student, None, margin=objective)
    loss, terms = measure(pairs, {"margin": 2.0})
    loss.backward()
    assert float(objective.margin.grad) == 2.0 * int(terms["margin"].count)
    assert int(measure.counts([pairs], ["margin"])["margin"]) == int(terms["margin"].count)
    assert any(parameter.grad.any() for parameter in student.parameters())
