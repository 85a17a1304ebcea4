"""Calibration metrics over batches and ranks: does the confidence of a model match its accuracy?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_distill.functional import (
    CalibrationBins,
    brier_score,
    equal_mass_bins,
    equal_width_bins,
    expected_calibration_error,
)
from lit_distill.objectives import LossTerm, Objective


class Calibration(NamedTuple):
    """The calibration of one model."""

    metrics: dict[str, Tensor]
    """``[]`` float32 each: ece, adaptive_ece, accuracy, and the means of the further values, such as brier."""
    bins: CalibrationBins
    """Bins of equal width, for the reliability diagram."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which is not used
    """``[]`` number of predictions."""


class CalibrationMetric(Metric):
    """Calibration of the most probable prediction, exact over batches and ranks in any order.

    All confidences are stored, because bins of equal mass can only be computed at the end. This takes 5 bytes per prediction,
    5 MB per million tokens, and avoids the approximation error of a histogram.

    Args:
        num_bins: number of bins of both calibration errors.
        means: names of further values per prediction to average, such as the Brier score; `update` gets them as keywords.
    """

    full_state_update = False
    confidences: list[Tensor] | Tensor
    correct: list[Tensor] | Tensor
    sums: Tensor

    def __init__(self, num_bins: int = 15, means: Sequence[str] = ("brier",)) -> None:
        super().__init__()
        self.num_bins = num_bins
        self.means = tuple(means)
        self.add_state("confidences", [], dist_reduce_fx="cat")
        self.add_state("correct", [], dist_reduce_fx="cat")
        self.add_state("sums", torch.zeros(len(self.means), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, confidences: Tensor, correct: Tensor, **means: Tensor) -> None:
        """Add N predictions, ``[N]`` each. A rank without predictions must call this too, with N = 0."""
        assert isinstance(self.confidences, list)
        assert isinstance(self.correct, list)
        self.confidences.append(confidences.detach().float())
        self.correct.append(correct)
        self.sums += torch.stack([means[name].detach().double().sum() for name in self.means]).to(self.sums.device)

    def compute(self) -> Calibration:
        """The metrics over the predictions of all ranks; NaN if there are none."""
        confidences, correct = dim_zero_cat(self.confidences), dim_zero_cat(self.correct).bool()
        bins = equal_width_bins(confidences, correct, self.num_bins)
        adaptive = equal_mass_bins(confidences, correct, self.num_bins)
        count = bins.count.sum()
        metrics = {
            "ece": expected_calibration_error(bins),
            "adaptive_ece": expected_calibration_error(adaptive),
            "accuracy": correct.double().mean(),
            **dict(zip(self.means, self.sums / count, strict=True)),
        }
        return Calibration({name: value.float() for name, value in metrics.items()}, bins, count)


class StudentConfidence(Objective):
    """Collects the next-token predictions of the student; an objective, so that it runs on the same chunks as the others.

    Args:
        num_bins: number of bins of the calibration errors.
    """

    def __init__(self, num_bins: int = 15) -> None:
        super().__init__()
        self.student = CalibrationMetric(num_bins)

    @property
    def models(self) -> dict[str, CalibrationMetric]:
        """The calibration metric of each model, by name."""
        return {"student": self.student}

    def forward(self, student_logits: Tensor, labels: Tensor) -> LossTerm:
        """Adds the predictions of the rows; the returned loss is 0."""
        collect(self.student, student_logits.detach().softmax(dim=-1), labels)
        return LossTerm(student_logits.new_zeros(()), len(labels))


class PairConfidence(Objective):
    """`StudentConfidence` for student and teacher.

    Args:
        num_bins: number of bins of the calibration errors.
    """

    def __init__(self, num_bins: int = 15) -> None:
        super().__init__()
        self.student = CalibrationMetric(num_bins)
        self.teacher = CalibrationMetric(num_bins)

    @property
    def models(self) -> dict[str, CalibrationMetric]:
        """The calibration metric of each model, by name."""
        return {"student": self.student, "teacher": self.teacher}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> LossTerm:
        """Adds the predictions of the rows; the returned loss is 0."""
        collect(self.student, student_logits.detach().softmax(dim=-1), labels)
        collect(self.teacher, teacher_logits.softmax(dim=-1), labels)
        return LossTerm(student_logits.new_zeros(()), len(labels))


def collect(metric: CalibrationMetric, probabilities: Tensor, labels: Tensor, **means: Tensor) -> None:
    """Add the most probable class of each row of ``[N, V]`` probabilities, with the Brier score over all V classes."""
    confidences, predicted = probabilities.max(dim=-1)
    metric.update(confidences, predicted == labels, brier=brier_score(probabilities, labels), **means)
