"""Calibration figures equal slow loops, hand-computed cases and torchmetrics; a calibrated model has error 0."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from lit_distill.functional import brier_score, equal_mass_bins, equal_width_bins, expected_calibration_error


def predictions(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator), torch.rand(count, generator=generator) < 0.6


def slow_error(groups: list[list[tuple[float, bool]]]) -> float:
    """Over groups of (confidence, correct)."""
    total = sum(map(len, groups))
    return sum(
        len(group) / total * abs(np.mean([right for _, right in group]) - np.mean([conf for conf, _ in group]))
        for group in groups
        if group
    )


@pytest.mark.parametrize("num_bins", [1, 2, 7, 15])
@pytest.mark.parametrize("count", [1, 5, 333])
def test_calibration_error_equals_a_loop_over_bins(num_bins, count) -> None:
    confidences, correct = predictions(count, seed=num_bins)
    pairs = list(zip(confidences.double().tolist(), correct.tolist(), strict=True))
    groups = [[pair for pair in pairs if k / num_bins <= pair[0] < (k + 1) / num_bins] for k in range(num_bins)]
    bins = equal_width_bins(confidences, correct, num_bins)
    assert bins.count.tolist() == [len(group) for group in groups]
    assert expected_calibration_error(bins).item() == pytest.approx(slow_error(groups), abs=1e-12)


@pytest.mark.parametrize("num_bins", [1, 2, 7, 15])
@pytest.mark.parametrize("count", [1, 5, 333])
def test_adaptive_error_equals_a_loop_over_slices_of_the_sorted_predictions(num_bins, count) -> None:
    confidences, correct = predictions(count, seed=num_bins)
    pairs = sorted(zip(confidences.double().tolist(), correct.tolist(), strict=True))
    cuts = [math.ceil(k * count / num_bins) for k in range(num_bins + 1)]
    groups = [pairs[start:stop] for start, stop in pairwise(cuts)]
    bins = equal_mass_bins(confidences, correct, num_bins)
    assert bins.count.tolist() == [len(group) for group in groups]
    assert max(bins.count) - min(bins.count) <= 1
    full = [(group[0][0], group[-1][0]) for group in groups if group]
    here = bins.count > 0
    assert list(zip(bins.low[here].tolist(), bins.high[here].tolist(), strict=True)) == full
    assert expected_calibration_error(bins).item() == pytest.approx(slow_error(groups), abs=1e-12)


def test_calibration_error_equals_torchmetrics() -> None:
    confidences, correct = predictions(1_000)
    theirs = binary_calibration_error(confidences, correct.int(), n_bins=15)
    ours = expected_calibration_error(equal_width_bins(confidences, correct, 15))
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=1e-6)


def test_a_case_by_hand() -> None:
    confidences = torch.tensor([0.25, 0.25, 0.75, 0.75, 1.0])
    correct = torch.tensor([True, False, True, True, False])
    bins = equal_width_bins(confidences, correct, 2)  # [0, ½): right 1/2, says 1/4; [½, 1]: right 2/3, says 5/6
    assert bins.low.tolist() == [0.0, 0.5]
    assert bins.high.tolist() == [0.5, 1.0]
    assert expected_calibration_error(bins).item() == pytest.approx((2 * 0.25 + 3 * (5 / 6 - 2 / 3)) / 5)
    bins = equal_mass_bins(confidences, correct, 5)  # ties share a bin
    assert bins.count.tolist() == [2, 0, 2, 0, 1]
    assert expected_calibration_error(bins).item() == pytest.approx((2 * 0.25 + 2 * 0.25 + 1.0) / 5)


def test_an_edge_belongs_to_the_bin_above_and_one_to_the_last() -> None:
    confidences = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert equal_width_bins(confidences, torch.ones(4, dtype=torch.bool), 4).count.tolist() == [1, 1, 1, 1]


def test_the_order_of_tied_predictions_changes_nothing() -> None:
    confidences = torch.tensor([0.5] * 7 + [0.9] * 6)
    correct = torch.arange(13) % 3 == 0
    for seed in range(5):
        order = torch.randperm(13, generator=torch.Generator().manual_seed(seed))
        shuffled = equal_mass_bins(confidences[order], correct[order], 4)
        for ours, first in zip(shuffled, equal_mass_bins(confidences, correct, 4), strict=True):
            torch.testing.assert_close(ours, first, rtol=0, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("group", [equal_width_bins, equal_mass_bins])
def test_a_calibrated_model_has_no_error_in_the_limit(group) -> None:
    generator = torch.Generator().manual_seed(0)
    errors = []
    for count in (1_000, 1_000_000):
        confidences = torch.rand(count, generator=generator)
        correct = torch.rand(count, generator=generator) < confidences
        errors.append(expected_calibration_error(group(confidences, correct, 15)).item())
    assert errors[1] < 0.002 < errors[0]


def test_overconfidence_is_measured_in_full() -> None:
    _, correct = predictions(10_000)
    bins = equal_width_bins(torch.full((10_000,), 0.97), correct, 15)
    assert expected_calibration_error(bins).item() == pytest.approx(0.97 - correct.double().mean().item(), abs=1e-6)


@pytest.mark.parametrize("group", [equal_width_bins, equal_mass_bins])
def test_nothing_to_group_is_nan(group) -> None:
    bins = group(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 3)
    assert bins.count.tolist() == [0, 0, 0]
    assert expected_calibration_error(bins).isnan()


@pytest.mark.parametrize("group", [equal_width_bins, equal_mass_bins])
def test_a_model_that_has_diverged_has_no_error_but_nan(group) -> None:
    bins = group(torch.tensor([0.5, float("nan"), 0.9]), torch.tensor([True, False, True]), 3)
    assert expected_calibration_error(bins).isnan()


def test_brier_score_equals_a_loop_over_the_vocabulary() -> None:
    probabilities = torch.randn(6, 11).softmax(dim=-1)
    labels = torch.randint(0, 11, (6,))
    slow = [
        sum((float(p) - (v == label)) ** 2 for v, p in enumerate(row))
        for row, label in zip(probabilities, labels.tolist(), strict=True)
    ]
    torch.testing.assert_close(brier_score(probabilities, labels), torch.tensor(slow), rtol=0, atol=1e-6)


def test_brier_scores_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]])
    assert brier_score(probabilities, torch.tensor([0, 0, 1])).tolist() == [0.5, 0.0, 2.0]


def test_shapes_and_bins_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3\] and \[2\]"):
        equal_width_bins(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="num_bins: expected at least 1, got 0"):
        equal_mass_bins(torch.zeros(3), torch.zeros(3), 0)
