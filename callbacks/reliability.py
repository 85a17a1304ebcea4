"""Reliability diagrams: accuracy over confidence, with the share of the predictions below."""

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

    Bars are the accuracy of the student's bins; points stand at the mean confidence and accuracy of each model's bins, a
    larger one for more predictions.

    Args:
        axes: empty, of ``figure.subplots()``; their lowest fifth becomes a strip for the shares.
        results: by who predicts.
        title: above all.
    """
    axes.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="as often right as sure", zorder=1)
    figure, place = axes.get_figure(), axes.get_subplotspec()
    assert figure is not None, "the axes stand in no figure"
    assert place is not None, "the axes are none of figure.subplots()"
    grid = place.subgridspec(2, 1, height_ratios=(4, 1))
    axes.set_subplotspec(grid[0])
    strip = figure.add_subplot(grid[1], sharex=axes)
    for position, (speaker, result) in enumerate(results.items()):
        low, high, confidence, accuracy, count = (values.cpu().numpy() for values in result.bins)
        color, used, share = COLORS[speaker], count > 0, 100 * count / max(1.0, count.sum())
        width = (high - low) / len(results)
        if speaker == "student":
            axes.bar(low[used], accuracy[used], (high - low)[used], align="edge", color=color, alpha=0.18, linewidth=0)
        label = f"{speaker}: ECE {float(result.figures['ece']):.3f}, accuracy {float(result.figures['accuracy']):.3f}"
        axes.plot(confidence[used], accuracy[used], color=color, linewidth=1, alpha=0.6, zorder=2)
        axes.scatter(
            confidence[used],
            accuracy[used],
            s=12 + 1.2 * share[used],
            color=color,
            marker=MARKERS[speaker],
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
