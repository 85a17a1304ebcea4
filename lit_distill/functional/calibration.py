"""Calibration of confidences: reliability bins, expected calibration error and the Brier score."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CalibrationBins(NamedTuple):
    """Predictions grouped by confidence, ``[K]`` float64 each; a bin without predictions has NaN means."""

    low: Tensor
    """Lowest confidence of the bin: its edge (equal width) or its lowest member (equal mass)."""
    high: Tensor
    """Highest confidence of the bin: its edge (equal width) or its highest member (equal mass)."""
    confidence: Tensor
    """Mean confidence of its predictions."""
    accuracy: Tensor
    """Share of its predictions that are correct."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which is not used
    """Number of its predictions."""


def equal_width_bins(confidences: Tensor, correct: Tensor, num_bins: int = 15) -> CalibrationBins:
    """Bins that split confidence evenly: [0, 1/K), … [1 − 1/K, 1].

    The last bin holds confidence 1 itself; torchmetrics' ``BinaryCalibrationError`` puts it into a bin of its own, which
    matters for language models: many of their float32 probabilities round to 1.

    Args:
        confidences: ``[N]`` probabilities of the predictions.
        correct: ``[N]`` bool, whether each prediction is correct.
        num_bins: K, >= 1.

    Raises:
        ValueError: if the shapes differ or there is no bin.

    Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599, section 2.
    """
    _check(confidences, correct, num_bins)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=confidences.device)
    members = torch.bucketize(confidences.double(), edges[1:-1], right=True)
    return CalibrationBins(edges[:-1], edges[1:], *_means(confidences, correct, members, num_bins))


def equal_mass_bins(confidences: Tensor, correct: Tensor, num_bins: int = 15) -> CalibrationBins:
    """Bins that hold equally many predictions each, up to one, in the order of confidence.

    Equal confidences share a bin, so that the order of the predictions does not matter: ties can leave bins empty.

    Args:
        confidences: ``[N]`` probabilities of the predictions.
        correct: ``[N]`` bool, whether each prediction is correct.
        num_bins: K, >= 1.

    Raises:
        ValueError: if the shapes differ or there is no bin.

    Source: Nguyen and O'Connor 2015, https://arxiv.org/abs/1508.05154, there "adaptive binning".
    """
    _check(confidences, correct, num_bins)
    ordered, order = confidences.double().sort()
    rank_of_tie = torch.searchsorted(ordered, ordered)
    members = (rank_of_tie * num_bins // max(1, len(ordered))).clamp(max=num_bins - 1)  # NaN is sorted last
    low, high = (
        torch.full((num_bins,), float("nan"), dtype=torch.float64, device=ordered.device).scatter_reduce(
            0, members, ordered, reduce, include_self=False
        )
        for reduce in ("amin", "amax")
    )
    return CalibrationBins(low, high, *_means(ordered, correct[order], members, num_bins))


def expected_calibration_error(bins: CalibrationBins) -> Tensor:
    """Mean over predictions of |accuracy − confidence| of their bin: 0 for a perfectly calibrated model.

    On a finite number N of predictions it is above 0 even then, of order sqrt(K / N): compare at equal N and K.

    Args:
        bins: of `equal_width_bins` for the usual ECE, of `equal_mass_bins` for the adaptive one.

    Returns:
        ``[]`` float64, 0 to 1; NaN without predictions.

    Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3.
    """
    gaps = (bins.accuracy - bins.confidence).abs() * bins.count
    return torch.where(bins.count > 0, gaps, 0.0).sum() / bins.count.sum()


def brier_score(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of each predicted distribution from the label: sum over v of (p_v − 1[v = label])².

    This is the multiclass form of Brier's paper. With two classes it is twice (1 − p_label)², the form that others report.

    Args:
        probabilities: ``[..., V]``, each row sums to 1.
        labels: ``[...]`` int64, the correct classes.

    Returns:
        ``[...]``, 0 to 2.

    Source: Brier 1950, "Verification of forecasts expressed in terms of probability".
    """
    of_label = probabilities.gather(-1, labels[..., None])[..., 0]
    # Σ_{v≠label} p_v² + (1 − p_label)², without a one-hot matrix
    return (torch.linalg.vecdot(probabilities, probabilities) - 2 * of_label + 1).clamp(min=0)


def _check(confidences: Tensor, correct: Tensor, num_bins: int) -> None:
    if confidences.shape != correct.shape or confidences.ndim != 1:
        raise ValueError(f"expected confidences and correct [N], got {[*confidences.shape]} and {[*correct.shape]}.")
    if num_bins < 1:
        raise ValueError(f"num_bins: expected at least 1, got {num_bins}.")


def _means(confidences: Tensor, correct: Tensor, members: Tensor, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.stack([confidences.double(), correct.double(), torch.ones_like(confidences, dtype=torch.float64)])
    sums = values.new_zeros(3, num_bins).index_add_(1, members, values)
    return sums[0] / sums[2], sums[1] / sums[2], sums[2]
