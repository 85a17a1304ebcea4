"""Text tables for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger


def show_samples(trainer: Trainer, tag: str, heads: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
    """Write a table to every TensorBoard logger; other loggers are skipped.

    Args:
        trainer: the Trainer with the loggers.
        tag: name of the table.
        heads: column names.
        rows: rows of cells with any text.
        step: optimiser step.
    """
    lines = [heads, ["---"] * len(heads), *([_cell(text) for text in row] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, table, step)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
