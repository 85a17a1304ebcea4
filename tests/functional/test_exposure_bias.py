"""The curves of exposure bias, by hand and by a loop over lengths."""

from __future__ import annotations

import pytest
import torch

from lit_distill.functional import exposure_bias


def test_the_curves_of_a_hand_computed_case() -> None:
    regret, baseline, excess = exposure_bias(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 0.5, 0.5]))
    assert regret.tolist() == [1.0, 3.0, 3.0]
    assert baseline.tolist() == [1.0, 1.5, 2.0]
    assert excess.tolist() == [0.0, 100.0, 50.0]


def test_the_curves_follow_the_formula_at_every_length() -> None:
    student, teacher = torch.rand(12, dtype=torch.float64), torch.rand(12, dtype=torch.float64)
    curves = exposure_bias(student, teacher)
    for length in range(1, 13):
        regret = sum(float(student[t]) for t in range(length))
        baseline = sum(float(teacher[t]) for t in range(length))
        assert curves.regret[length - 1] == pytest.approx(regret)
        assert curves.baseline[length - 1] == pytest.approx(baseline)
        assert curves.excess[length - 1] == pytest.approx((regret - baseline) / baseline * 100)


@pytest.mark.parametrize("noise", [0.0, 1e-8, -1e-8])
def test_a_student_equal_to_its_teacher_up_to_rounding_has_no_excess(noise: float) -> None:
    assert exposure_bias(torch.full((5,), noise), torch.full((5,), 2e-8)).excess.tolist() == [0.0] * 5


def test_a_student_that_errs_on_its_own_texts_alone_has_infinite_excess() -> None:
    assert exposure_bias(torch.tensor([0.1]), torch.tensor([0.0])).excess.item() == torch.inf


def test_curves_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student_errors \[3\], teacher_errors \[4\]"):
        exposure_bias(torch.zeros(3), torch.zeros(4))
