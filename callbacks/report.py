"""Writes the results of a test as `report.json` and `report.html`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.files import write_text
from lit_distill.report.page import render_page, text_card
from lit_distill.report.record import Report, find_reports, make_report, read_config, write_report

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule


class RunReport(Callback):
    """Writes ``report.json`` and ``report.html`` to the run's folder at the end of `test`, and prints the table.

    The page has no scripts and loads nothing from the network. It contains the metrics logged as ``test/…``, the sections from
    every callback with a method ``report() -> dict`` of JSON values, and the training curves of the checkpoint's run.
    `tools/compare_runs.py` makes one page of several runs.

    Args:
        enabled: whether to write them.
        compare_with: folders or ``report.json`` files of other tests to compare with this one, such as a test of the student
            before training, which is a test without ``--ckpt_path``.
    """

    def __init__(self, enabled: bool = True, compare_with: list[str] | None = None) -> None:
        self.enabled = enabled
        self.compare_with = list(compare_with or [])
        self._others: list[Report] = []

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Read the other reports, so that their errors are raised before the test."""
        if self.enabled and stage == "test":
            found = [
                report for place in self.compare_with for report in find_reports(Path(place), "report.compare_with")
            ]
            self._others = list({report["run"]["folder"]: report for report in found}.values())

    def on_test_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Switch off Lightning's table, since the table at the end has the same numbers."""
        self._prints = trainer.test_loop.verbose
        if self.enabled:
            trainer.test_loop.verbose = False

    def on_test_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Collect the results on all ranks, and write them on rank 0."""
        if not self.enabled:
            return
        folder = trainer.log_dir  # on all ranks: log_dir is broadcast
        logged = trainer.callback_metrics.items()
        metrics = {name.removeprefix("test/"): value for name, value in logged if name != "step"}
        sections = self._sections(trainer)
        if not trainer.is_global_zero:
            return
        report = make_report(
            Path(folder or trainer.default_root_dir),
            metrics,
            sections,
            pl_module.student_spec.path,
            pl_module.teacher_config.description if pl_module.teacher_config else None,
            self._config(trainer, folder),
            Path(trainer.ckpt_path) if trainer.ckpt_path else None,
            pl_module.trained_steps or None,
            getattr(trainer.datamodule, "seed", None),  # type: ignore[attr-defined]
        )
        everything = [*self._others, report]
        if self._prints:
            rank_zero_info("\n" + text_card(everything))
        if folder is not None:  # None in a fast_dev_run, which writes no files
            record = write_report(report, Path(folder))
            page = record.with_suffix(".html")
            write_text(page, render_page(everything))
            rank_zero_info(f"Report: {page} ({record.name} in the same folder)")

    def _sections(self, trainer: Trainer) -> dict[str, list[Any]]:
        """The sections of all callbacks, as lists, since two callbacks may have a section of the same name."""
        sections: dict[str, list[Any]] = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callable(report := getattr(callback, "report", None)):
                for name, entry in report().items():
                    sections.setdefault(name, []).extend(entry if isinstance(entry, list) else [entry])
        return sections

    def _config(self, trainer: Trainer, folder: str | None) -> dict[str, Any]:
        """The config that the command line saved in this run's folder; empty without a command line."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfigCallback) and folder is not None:
                return read_config(Path(folder) / callback.config_filename)
        return {}
