"""Reliability diagrams: accuracy over confidence, and below it the share of predictions in each bin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lit_distill.evaluation.calibration import Calibration

COLORS = {"student": "#1f6fb4", "teacher": "#d9730d"}
MARKERS = {"student": "o", "teacher": "D"}


def draw_reliability(axes: Axes, results: Mapping[str, Calibration], title: str = "") -> None:
    """Draw student and teacher on the same axes; a calibrated model's points lie on the diagonal.

    Bars show the accuracy of the student's bins; points show the mean confidence and accuracy of each model's bins, and are
    larger for more predictions.

    Args:
        axes: empty axes of ``figure.subplots()``; their lowest fifth becomes the plot of the shares.
        results: results by model: student, teacher.
        title: title of the diagram.
    """
    axes.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="perfectly calibrated", zorder=1)
    figure, place = axes.get_figure(), axes.get_subplotspec()
    assert figure is not None, "the axes belong to no figure"
    assert place is not None, "the axes are not from figure.subplots()"
    grid = place.subgridspec(2, 1, height_ratios=(4, 1))
    axes.set_subplotspec(grid[0])
    strip = figure.add_subplot(grid[1], sharex=axes)
    for position, (role, result) in enumerate(results.items()):
        low, high, confidence, accuracy, count = (values.cpu().numpy() for values in result.bins)
        color, used, share = COLORS[role], count > 0, 100 * count / max(1.0, count.sum())
        width = (high - low) / len(results)
        if role == "student":
            axes.bar(low[used], accuracy[used], (high - low)[used], align="edge", color=color, alpha=0.18, linewidth=0)
        label = f"{role}: ECE {float(result.metrics['ece']):.3f}, accuracy {float(result.metrics['accuracy']):.3f}"
        axes.plot(confidence[used], accuracy[used], color=color, linewidth=1, alpha=0.6, zorder=2)
        axes.scatter(
            confidence[used],
            accuracy[used],
            s=12 + 1.2 * share[used],
            color=color,
            marker=MARKERS[role],
            edgecolor="white",
            linewidth=0.6,
            label=label,
            zorder=3,
            clip_on=False,
        )
        strip.bar(low + position * width, share, width, align="edge", color=color, alpha=0.8, linewidth=0)
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=title)
    axes.legend(loc="upper left", fontsize="small", frameon=False)
    axes.tick_params(labelbottom=False)
    num_predictions = int(max(result.count for result in results.values()))
    strip.set(xlabel=f"confidence ({num_predictions:,} predictions)", ylabel="% of them")
