"""Calibration adds up over batches and ranks, and listens to the held-out rows without running a model again."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import ragged_text

from lit_distill.evaluation.calibration import CalibrationMetric, PairConfidence, StudentConfidence, collect
from lit_distill.evaluation.token_metrics import TokenMetrics
from lit_distill.objectives import ForwardKL, NextToken


def shares(count: int, parts: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[slice]]:
    probabilities = torch.randn(count, 9).mul(2).softmax(dim=-1)
    cuts = [0, *parts, count]
    return probabilities, torch.randint(0, 9, (count,)), [slice(*cut) for cut in pairwise(cuts)]


def filled(probabilities, labels, parts) -> CalibrationMetric:
    metric = CalibrationMetric(7)
    for part in parts:
        collect(metric, probabilities[part], labels[part])
    return metric


def test_an_odd_number_of_items_on_two_ranks_equals_one_rank_exactly() -> None:
    probabilities, labels, parts = shares(101, [33, 33, 50])  # one share is empty
    one = filled(probabilities, labels, [slice(0, 101)]).compute()
    two = filled(probabilities, labels, [parts[3], parts[0]])
    two.merge_state(filled(probabilities, labels, [parts[2], parts[1]]))
    merged = two.compute()
    assert merged.metrics == one.metrics
    assert merged.count == one.count == 101
    for ours, theirs in zip(merged.bins, one.bins, strict=True):
        assert torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1))


def test_figures_equal_a_slow_computation_in_numpy() -> None:
    probabilities, labels, _ = shares(64, [])
    figures = filled(probabilities, labels, [slice(0, 64)]).compute().metrics
    p, y = probabilities.double().numpy(), labels.numpy()
    right = p.argmax(axis=1) == y
    confidence = p.max(axis=1)
    brier = np.mean([sum((p[i, v] - (v == y[i])) ** 2 for v in range(9)) for i in range(64)])
    ece = 0.0
    for k in range(7):
        inside = (confidence >= k / 7) & (confidence < (k + 1) / 7)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    order = np.argsort(confidence)
    groups = [order[[i for i in range(64) if i * 7 // 64 == k]] for k in range(7)]
    adaptive = sum(len(g) / 64 * abs(right[g].mean() - confidence[g].mean()) for g in groups)
    expected = {"ece": ece, "adaptive_ece": adaptive, "accuracy": right.mean(), "brier": brier}
    assert {name: value.item() for name, value in figures.items()} == pytest.approx(expected, abs=1e-6)


def test_the_state_of_a_token_is_five_bytes() -> None:
    metric = filled(*shares(50, [20]))
    kept = [*metric.confidences, *metric.correct]
    assert sum(part.nbytes for part in kept) == 5 * 50


@pytest.mark.parametrize("rows", [None, 3])
def test_a_listener_hears_every_target_once_and_changes_no_figure(student, teacher, rows) -> None:
    texts = [ragged_text(), ragged_text(3)]
    figures = []
    listener = PairConfidence(5)
    for listens in (False, True):
        token_metrics = TokenMetrics({"ce": NextToken()}, student, teacher, rows)
        if listens:
            token_metrics.attach("calibration", listener)
        with torch.no_grad():
            token_metrics.update(texts)
        figures.append(token_metrics.metrics())
    assert figures[0] == figures[1]

    expected = {"student": CalibrationMetric(5), "teacher": CalibrationMetric(5)}
    for text in texts:
        for name, lm in (("student", student), ("teacher", teacher.lm)):
            with torch.no_grad():
                logits = lm.model(input_ids=text.input_ids, attention_mask=text.attention_mask).logits
            for row in range(len(text)):
                for column in text.target_mask[row].nonzero()[:, 0].tolist():
                    p = logits[row, column - 1].softmax(dim=-1)[None]
                    collect(expected[name], p, text.input_ids[row, column][None])
    for name, metric in listener.models.items():
        ours, theirs = metric.compute(), expected[name].compute()
        assert ours.count == theirs.count == sum(int(text.target_mask.sum()) for text in texts)
        for figure, value in ours.metrics.items():
            torch.testing.assert_close(value, theirs.metrics[figure], rtol=0, atol=1e-5)


def test_a_teacher_that_is_worse_than_chance_is_warned_of_once(student, teacher, text) -> None:
    token_metrics = TokenMetrics({"ce": NextToken()}, student, teacher)
    head = teacher.lm.model.lm_head.weight
    for scale, times in ((1, 0), (1000, 1), (10, 0)):
        with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            head.mul_(scale)
            token_metrics.update([text])
            token_metrics.metrics()
            token_metrics.reset()
        assert sum("worse than chance over the 41 tokens" in str(each.message) for each in seen) == times


def test_no_body_runs_twice(student, text) -> None:
    calls = []
    student.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    token_metrics = TokenMetrics({"ce": NextToken()}, student, None)
    token_metrics.attach("calibration", StudentConfidence())
    with torch.no_grad():
        token_metrics.update([text])
    assert len(calls) == 1


def test_an_objective_that_is_called_as_a_metric_changes_neither_it_nor_the_loss(student, teacher, text) -> None:
    found = {}
    for name in ("kd", "forward_kl"):
        objectives = {name: ForwardKL(weight=2.0, temperature=3.0)}
        token_metrics = TokenMetrics(objectives, student, teacher)
        with torch.no_grad():
            token_metrics.update([text])
        found[name] = token_metrics.metrics()
    apart = found["kd"].pop("kd")
    assert found["forward_kl"] == found["kd"]
    assert found["kd"]["loss"] == 2 * apart
    assert float(apart) != pytest.approx(float(found["kd"]["forward_kl"]), rel=0.01)


def test_an_objective_may_be_called_as_the_quality_of_the_text_is(student, text) -> None:
    token_metrics = TokenMetrics({"quality": NextToken()}, student, None)
    with torch.no_grad():
        token_metrics.update([text])
    torch.testing.assert_close(token_metrics.metrics()["quality"].exp(), token_metrics.metrics()["perplexity"])


def test_the_dummy_row_of_a_rank_without_items_is_not_heard(student, text) -> None:
    token_metrics, listener = TokenMetrics({"ce": NextToken()}, student, None), StudentConfidence()
    token_metrics.attach("calibration", listener)
    nothing = type(text)(text.input_ids[:1], text.attention_mask[:1], torch.zeros_like(text.target_mask[:1]))
    with torch.no_grad():
        token_metrics.update([nothing])
    assert listener.student.update_called
    assert listener.student.compute().count == 0
