"""Objectives of on-policy distillation: the sums of their functions, what they log, need and accept, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from lit_distill.functional import (
    entropy_gated_kl,
    extrapolated_reverse_kl,
    reverse_kl,
    sampled_reverse_kl,
    top_k_forward_kl,
    top_k_reverse_kl,
)
from lit_distill.objectives import (
    DirectPreference,
    EntropyGatedKL,
    ExtrapolatedReverseKL,
    ReferenceKL,
    SampledReverseKL,
    TopKForwardKL,
    TopKReverseKL,
    metric_names,
    probe,
    weighted_sum,
)

ALL = [TopKForwardKL, TopKReverseKL, EntropyGatedKL, ExtrapolatedReverseKL, SampledReverseKL, ReferenceKL]
N, V = 5, 12
MASSES = ["overlap", "student_mass", "teacher_mass"]


@pytest.fixture
def signals():
    generator = torch.Generator().manual_seed(0)
    given = {f"{who}_logits": 2 * torch.randn(N, V, generator=generator) for who in ("student", "teacher", "reference")}
    return given | {"labels": torch.randint(V, (N,), generator=generator)}


def take(objective, signals):
    return objective(**{name: signals[name] for name in objective.needs})


@pytest.mark.parametrize(
    ("objective", "function", "names"),
    [
        (
            TopKForwardKL(temperature=2.0, top_k=3),
            lambda q, p, ref, y: top_k_forward_kl(q, p, 3, "teacher", 2.0),
            ["student_logits", "teacher_logits"],
        ),
        (
            TopKReverseKL(temperature=2.0, top_k=4, support="student"),
            lambda q, p, ref, y: top_k_reverse_kl(q, p, 4, "student", 2.0),
            ["student_logits", "teacher_logits"],
        ),
        (
            EntropyGatedKL(temperature=2.0, threshold=1.5, width=0.3),
            lambda q, p, ref, y: entropy_gated_kl(q, p, 1.5, 0.3, 2.0),
            ["student_logits", "teacher_logits"],
        ),
        (
            ExtrapolatedReverseKL(temperature=2.0, scale=1.5),
            lambda q, p, ref, y: extrapolated_reverse_kl(q, p, ref, 1.5, 2.0),
            ["reference_logits", "student_logits", "teacher_logits"],
        ),
        (
            SampledReverseKL(temperature=2.0, baseline=False),
            lambda q, p, ref, y: sampled_reverse_kl(q, p, y, False, 2.0),
            ["labels", "student_logits", "teacher_logits"],
        ),
        (
            ReferenceKL(temperature=2.0),
            lambda q, p, ref, y: reverse_kl(q, ref, 2.0),
            ["reference_logits", "student_logits"],
        ),
    ],
)
def test_each_sums_its_function_over_all_rows(objective, function, names, signals) -> None:
    assert sorted(objective.needs) == names
    student = signals["student_logits"].clone().requires_grad_()
    term = take(objective, signals | {"student_logits": student})
    expected = function(student, signals["teacher_logits"], signals["reference_logits"], signals["labels"])
    assert term.count == N
    torch.testing.assert_close(term.total, expected.sum())
    gradient, expected_gradient = (torch.autograd.grad(x, student)[0] for x in (term.total, expected.sum()))
    torch.testing.assert_close(gradient, expected_gradient)
    assert gradient.abs().sum() > 0


def test_settings_that_are_not_given_have_their_documented_defaults(signals) -> None:
    q, p, ref, y = (signals[name] for name in ("student_logits", "teacher_logits", "reference_logits", "labels"))
    torch.testing.assert_close(ExtrapolatedReverseKL()(q, p, ref).total, extrapolated_reverse_kl(q, p, ref, 1.25).sum())
    torch.testing.assert_close(EntropyGatedKL()(q, p).total, entropy_gated_kl(q, p, 1.0, 0.0).sum())
    student = q.clone().requires_grad_()
    terms = SampledReverseKL()(student, p, y).total, sampled_reverse_kl(student, p, y, True).sum()
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in terms))


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("kind", [TopKForwardKL, TopKReverseKL])
def test_the_top_tokens_say_how_much_of_both_distributions_they_hold(kind, support, signals) -> None:
    q, p = (signals[f"{who}_logits"].double().softmax(-1) for who in ("student", "teacher"))
    metrics = take(kind(top_k=3, support=support), signals).metrics
    expected = dict.fromkeys(MASSES, 0.0)
    for row in range(N):
        tops = {who: sorted(range(V), key=lambda v, x=x: -x[row, v])[:3] for who, x in (("student", q), ("teacher", p))}
        expected["overlap"] += len({*tops["student"]} & {*tops["teacher"]}) / 3
        expected["student_mass"] += float(q[row, tops[support]].sum())
        expected["teacher_mass"] += float(p[row, tops[support]].sum())
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, abs=1e-5)


def test_the_gated_kl_says_how_much_of_it_is_forward_kl(signals) -> None:
    p = signals["teacher_logits"].double().softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    between = float(entropy.sort().values[1:3].mean())
    metrics = take(EntropyGatedKL(threshold=between), signals).metrics
    assert {name: float(value) for name, value in metrics.items()} == {"forward_share": 3.0}  # of five rows


@pytest.mark.parametrize("kind", ALL)
def test_each_passes_the_probe_at_any_size_of_vocabulary_and_names_its_metrics(kind) -> None:
    for vocabulary in (2, 7, 50):
        assert not probe(kind(), vocabulary, "model.objectives.x")
    expected = {TopKForwardKL: MASSES, TopKReverseKL: MASSES, EntropyGatedKL: ["forward_share"]}.get(kind, [])
    assert sorted(metric_names(kind())) == expected


@pytest.mark.parametrize("kind", ALL)
def test_each_can_be_combined_and_leaves_its_signals_alone(kind, signals) -> None:
    student = signals["student_logits"].clone().requires_grad_()
    before = {name: value.clone() for name, value in signals.items()}
    loss, terms = weighted_sum({"x": kind()}, {"x": 0.5}, signals | {"student_logits": student})
    torch.testing.assert_close(loss, 0.5 * terms["x"].total)
    assert not any(metric.requires_grad for metric in terms["x"].metrics.values())
    assert all(torch.equal(signals[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", [TopKForwardKL, TopKReverseKL])
def test_more_tokens_than_the_vocabulary_has_are_all_of_them(kind, signals) -> None:
    torch.testing.assert_close(
        take(kind(top_k=V + 20), signals).total, take(kind(top_k=V), signals).total, rtol=0, atol=0
    )
    assert float(take(kind(top_k=V + 20), signals).metrics["student_mass"]) == pytest.approx(N)


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind is not ReferenceKL])
def test_a_teacher_without_probability_for_some_tokens_is_accepted_by_what_stays_finite(kind, signals) -> None:
    """Rows as a truncated teacher gives them: all but its three best tokens are impossible. The label is not among them."""
    teacher = signals["teacher_logits"]
    truncated = teacher.masked_fill(teacher < teacher.topk(3).values[:, -1:], -math.inf)
    given = signals | {"teacher_logits": truncated, "labels": truncated.argmin(-1)}
    objectives = (
        [kind(top_k=6, support=support) for support in ("teacher", "student")] if "TopK" in kind.__name__ else [kind()]
    )
    for objective in objectives:
        assert math.isfinite(float(take(objective, given).total)) == ("truncated" in objective.accepts_teacher)
        assert {"exact", "spread"} <= objective.accepts_teacher
        assert "drawn" not in objective.accepts_teacher


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TopKForwardKL(top_k=1), r"^top_k: expected 2 or more, got 1"),
        (lambda: TopKReverseKL(top_k=0), r"^top_k: expected 2 or more, got 0"),
        (lambda: TopKReverseKL(support="both"), r"^support: .*'both'"),
        (lambda: EntropyGatedKL(width=-1.0), r"^width: .*-1"),
        (lambda: EntropyGatedKL(threshold=math.inf), r"^threshold: .*inf"),
        (lambda: ExtrapolatedReverseKL(scale=0.0), r"^scale: .*0"),
        (lambda: SampledReverseKL(temperature=0.0), r"^temperature: "),
        (lambda: ReferenceKL(temperature=-1.0), r"^temperature: "),
    ],
)
def test_settings_that_cannot_be_are_refused_when_the_yaml_is_read(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_margin_of_the_teacher_is_set_in_the_objective_and_its_rewards_are_the_students_alone() -> None:
    given = {
        f"{who}_{role}_logprobs": torch.tensor([[total, 0.0]])
        for (who, role), total in {
            ("student", "chosen"): -2.0,
            ("student", "rejected"): -3.0,
            ("teacher", "chosen"): -1.0,
            ("teacher", "rejected"): -5.0,
        }.items()
    } | {f"{role}_mask": torch.ones(1, 2, dtype=torch.bool) for role in ("chosen", "rejected")}
    objective = DirectPreference(variant="teacher_margin", beta=0.5, teacher_margin=0.2)
    term = objective(**given)
    margin = 0.5 * (-2.0 + 3.0) / 2 - 0.2 * (-1.0 + 5.0) / 2
    assert float(term.total) == pytest.approx(math.log(1 + math.exp(-margin)))
    assert float(term.metrics["margin"]) == pytest.approx(0.25)
    assert float(term.metrics["reward_chosen"]) == pytest.approx(-0.5)
    assert "teacher_chosen_logprobs" in objective.needs
    with pytest.raises(ValueError, match=r"^teacher_margin: .*-1"):
        DirectPreference(teacher_margin=-1.0)


def test_a_sampled_divergence_is_not_measured_on_the_texts_of_a_validation() -> None:
    from lit_distill.evaluation.token_metrics import measurable

    objectives = {"pg": SampledReverseKL(), "kl": TopKReverseKL()}
    assert set(measurable(objectives, has_teacher=True)) == {"kl"}
