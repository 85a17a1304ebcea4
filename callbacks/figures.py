"""Matplotlib figures for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_distill.report.figures import make_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show_figure(trainer: Trainer, tag: str, draw: Callable[[Figure], None], step: int) -> None:
    """Write a figure to every TensorBoard logger; other loggers are skipped.

    Args:
        trainer: the Trainer with the loggers.
        tag: name of the figure.
        draw: draws on an empty figure, as in `lit_distill.report.figures`; not called without a TensorBoard logger.
        step: optimiser step.
    """
    for logger in trainer.loggers:
        if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(tag, make_figure(draw), step)
