"""Matplotlib figures for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def show_figure(trainer: Trainer, tag: str, draw: Callable[[Axes], None], step: int) -> None:
    """Write a figure to every TensorBoard logger; other loggers are skipped.

    Args:
        trainer: the Trainer with the loggers.
        tag: name of the figure.
        draw: draws the figure on empty axes; not called without a TensorBoard logger.
        step: optimiser step.
    """
    for logger in trainer.loggers:
        if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
            from matplotlib.figure import Figure  # slow to import

            figure = Figure(figsize=(6, 5), dpi=100, layout="constrained")
            draw(figure.subplots())
            logger.experiment.add_figure(tag, figure, step)
