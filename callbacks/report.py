"""What a test says, for machines and for people: `report.json` and `report.html`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.atomic import write_text
from lit_distill.evaluation.report import (
    Report,
    find_reports,
    make_report,
    read_config,
    render_page,
    text_card,
    write_report,
)

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule


class RunReport(Callback):
    """Writes ``report.json`` and ``report.html`` to the run's folder at the end of `test`, and prints the table.

    The page has no scripts and asks for nothing from outside. In it are the figures that were logged as ``test/…``, what every
    callback with a method ``report() -> dict`` of JSON-able sections says, and the curves of the training that a checkpoint
    comes from. `tools/compare_runs.py` makes one page of several runs.

    Args:
        enabled: write them.
        compare_with: folders or ``report.json`` files of other tests to show beside this one, such as that of the student
            before its training, which is a test without ``--ckpt_path``.
    """

    def __init__(self, enabled: bool = True, compare_with: list[str] | None = None) -> None:
        self.enabled = enabled
        self.compare_with = list(compare_with or [])
        self._others: list[Report] = []

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Read the other reports, so that what is wrong with them is said before the work."""
        if self.enabled and stage == "test":
            found = [
                report for place in self.compare_with for report in find_reports(Path(place), "report.compare_with")
            ]
            self._others = list({report["run"]["folder"]: report for report in found}.values())

    def on_test_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """The table at the end replaces Lightning's, which has the same numbers in another order."""
        self._prints = trainer.test_loop.verbose
        if self.enabled:
            trainer.test_loop.verbose = False

    def on_test_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Gather on all ranks, write on the first."""
        if not self.enabled:
            return
        folder = trainer.log_dir  # asks all ranks
        logged = trainer.callback_metrics.items()
        figures = {name.removeprefix("test/"): value for name, value in logged if name != "step"}
        sections = self._sections(trainer)
        if not trainer.is_global_zero:
            return
        report = make_report(
            Path(folder or trainer.default_root_dir),
            figures,
            sections,
            pl_module.student_spec.path,
            pl_module.teacher_spec.path if pl_module.teacher_spec else None,
            self._config(trainer, folder),
            Path(trainer.ckpt_path) if trainer.ckpt_path else None,
            pl_module.trained_steps or None,
            getattr(trainer.datamodule, "seed", None),  # type: ignore[attr-defined]
        )
        everything = [*self._others, report]
        if self._prints:
            rank_zero_info("\n" + text_card(everything))
        if folder is not None:  # None in a fast_dev_run, which leaves nothing behind
            record = write_report(report, Path(folder))
            page = record.with_suffix(".html")
            write_text(page, render_page(everything))
            rank_zero_info(f"Report: {page} ({record.name} beside it)")

    def _sections(self, trainer: Trainer) -> dict[str, list[Any]]:
        """All callbacks' sections as lists, so that two callbacks may speak of the same."""
        sections: dict[str, list[Any]] = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callable(report := getattr(callback, "report", None)):
                for name, entry in report().items():
                    sections.setdefault(name, []).extend(entry if isinstance(entry, list) else [entry])
        return sections

    def _config(self, trainer: Trainer, folder: str | None) -> dict[str, Any]:
        """The configuration that the command line has kept in this run's folder; nothing without a command line."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfigCallback) and folder is not None:
                return read_config(Path(folder) / callback.config_filename)
        return {}
