"""Calibration over batches and ranks: is a model right as often as it is confident?"""

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
    """What is known of a model's confidence."""

    figures: dict[str, Tensor]
    """[] float32 each: ece, adaptive_ece, accuracy, and the means of what else was measured."""
    bins: CalibrationBins
    """Of equal width, for the reliability diagram."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    """[] how many predictions."""


class CalibrationMetric(Metric):
    """Calibration of the most probable prediction, exact over batches and ranks in any order.

    All confidences are kept, at 5 bytes a prediction: bins of equal mass are known only at the end, and 5 MB for a million
    tokens is less than it would take to argue about the error of a histogram.

    Args:
        num_bins: of both kinds of calibration error.
        means: names of what else `update` brings for every prediction, such as the Brier score.
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
        """Add predictions, ``[N]`` each; a rank without any adds none, but must add."""
        assert isinstance(self.confidences, list)
        assert isinstance(self.correct, list)
        self.confidences.append(confidences.detach().float())
        self.correct.append(correct)
        self.sums += torch.stack([means[name].detach().double().sum() for name in self.means]).to(self.sums.device)

    def compute(self) -> Calibration:
        """The figures of all ranks' predictions, NaN where there are none."""
        confidences, correct = dim_zero_cat(self.confidences), dim_zero_cat(self.correct).bool()
        bins = equal_width_bins(confidences, correct, self.num_bins)
        adaptive = equal_mass_bins(confidences, correct, self.num_bins)
        count = bins.count.sum()
        figures = {
            "ece": expected_calibration_error(bins),
            "adaptive_ece": expected_calibration_error(adaptive),
            "accuracy": correct.double().mean(),
            **dict(zip(self.means, self.sums / count, strict=True)),
        }
        return Calibration({name: value.float() for name, value in figures.items()}, bins, count)


class StudentConfidence(Objective):
    """Collects the student's next-token predictions, as an objective so that it runs on the same chunks as the others.

    Args:
        num_bins: of the calibration errors.
    """

    def __init__(self, num_bins: int = 15) -> None:
        super().__init__()
        self.student = CalibrationMetric(num_bins)

    @property
    def speakers(self) -> dict[str, CalibrationMetric]:
        """What was collected, by who predicts."""
        return {"student": self.student}

    def forward(self, student_logits: Tensor, labels: Tensor) -> LossTerm:
        """Adds the rows; its total is nothing to learn from."""
        collect(self.student, student_logits.detach().softmax(dim=-1), labels)
        return LossTerm(student_logits.new_zeros(()), len(labels))


class PairConfidence(Objective):
    """`StudentConfidence` with the same for the teacher.

    Args:
        num_bins: of the calibration errors.
    """

    def __init__(self, num_bins: int = 15) -> None:
        super().__init__()
        self.student = CalibrationMetric(num_bins)
        self.teacher = CalibrationMetric(num_bins)

    @property
    def speakers(self) -> dict[str, CalibrationMetric]:
        """What was collected, by who predicts."""
        return {"student": self.student, "teacher": self.teacher}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> LossTerm:
        """Adds the rows; its total is nothing to learn from."""
        collect(self.student, student_logits.detach().softmax(dim=-1), labels)
        collect(self.teacher, teacher_logits.softmax(dim=-1), labels)
        return LossTerm(student_logits.new_zeros(()), len(labels))


def collect(metric: CalibrationMetric, probabilities: Tensor, labels: Tensor, **means: Tensor) -> None:
    """Add the most probable prediction of each row of ``[N, V]`` probabilities, with the Brier score over all V."""
    confidences, predicted = probabilities.max(dim=-1)
    metric.update(confidences, predicted == labels, brier=brier_score(probabilities, labels), **means)
