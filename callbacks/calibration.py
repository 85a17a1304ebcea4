"""Whether the student knows what it knows: calibration of its next tokens and of its answers to classification tasks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from lit_distill.callbacks.figures import show_figure
from lit_distill.callbacks.reliability import draw_reliability

from lit_distill.evaluation.calibration import Calibration, PairConfidence, StudentConfidence
from lit_distill.evaluation.label_words import LabelWords, LabelWordTask

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule

NEXT = "next token"


class CalibrationMonitor(Callback):
    """Logs how well confidence and accuracy agree, of the student and of the teacher beside it, with reliability diagrams.

    ``ece``: mean gap between confidence and accuracy over bins of equal width; ``adaptive_ece``: over bins of equal mass;
    ``brier``: squared distance between the predicted distribution and what came true, summed over all classes (0 to 2);
    ``accuracy`` of the most probable prediction. Of next tokens as ``val/ece``, ``val/teacher_ece`` …; of a task as
    ``test/<task>/ece`` …, with ``mass``, the probability of all its words together before they are renormalised.

    Args:
        num_bins: of the calibration errors and the diagrams.
        next_token: measure the next tokens of held-out responses at every validation and test, in the forward passes that
            run there anyway.
        tasks: classification by label words, by name; asked at `test`.
        every_n_validations: ask the tasks at every n-th validation too.

    Raises:
        ValueError: naming the key.
    """

    def __init__(
        self,
        num_bins: int = 15,
        next_token: bool = True,
        tasks: dict[str, LabelWords] | None = None,
        every_n_validations: int | None = None,
    ) -> None:
        if num_bins < 2:
            raise ValueError(f"calibration.num_bins: expected at least 2, got {num_bins}.")
        if every_n_validations is not None and every_n_validations < 1:
            raise ValueError(
                f"calibration.every_n_validations: expected at least 1, or null for never, got {every_n_validations}."
            )
        self.num_bins = num_bins
        self.next_token = next_token
        self.tasks = dict(tasks or {})
        for name, task in self.tasks.items():
            task.check(f"calibration.tasks.{name}")
        self.every_n_validations = every_n_validations
        self._validations = 0
        self._ready: dict[str, LabelWordTask] = {}
        self._listener: StudentConfidence | PairConfidence | None = None
        self._results: dict[str, dict[str, Calibration]] = {}

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Read the tasks, so that what is wrong with them is said before any weights load."""
        if stage == "test" or (self.every_n_validations and stage in {"fit", "validate"}):
            for name, task in self.tasks.items():
                key = f"calibration.tasks.{name}"
                self._ready[name] = LabelWordTask(task, pl_module.tokenizer, key, self.num_bins)

    def metric_names(self, trainer: Trainer, pl_module: DistillationModule) -> list[str]:
        """What a validation logs, known before any weights load."""
        figures = ["ece", "adaptive_ece", "accuracy", "brier"]
        responses = getattr(trainer.datamodule, "responses", True)  # type: ignore[attr-defined]
        places = {"val": figures} if self.next_token and responses else {}
        places |= {f"val/{task}": [*figures, "mass"] for task in self.tasks if self.every_n_validations}
        speakers = ["", "teacher_"] if pl_module.teacher_spec else [""]
        return [f"{place}/{who}{name}" for place, names in places.items() for who in speakers for name in names]

    def report(self) -> dict[str, Any]:
        """What the last validation or test has found, of each model; bins without predictions are left out."""
        entries = [
            {
                "name": name,
                "speaker": speaker,
                **{figure: float(value) for figure, value in result.figures.items()},
                "count": int(result.count),
                "bins": _bins(result),
            }
            for name, speakers in self._results.items()
            for speaker, result in speakers.items()
        ]
        return {"calibration": entries} if entries else {}

    def _start(self, pl_module: DistillationModule) -> None:
        self._results = {}
        if not self.next_token:
            return
        if self._listener is None:
            listens = PairConfidence if pl_module.teacher else StudentConfidence
            self._listener = listens(self.num_bins)
            pl_module.held_out.listen("calibration", self._listener)
        for metric in self._listener.speakers.values():
            pl_module.over_ranks(metric).reset()

    def _finish(self, trainer: Trainer, pl_module: DistillationModule, stage: str, ask: bool) -> None:
        if self._listener is not None:
            metrics = self._listener.speakers
            if metrics["student"].update_called:  # on all ranks or on none: data without responses show no rows
                self._results[NEXT] = {speaker: metric.compute() for speaker, metric in metrics.items()}
        if ask:
            speakers = {"student": pl_module.student, "teacher": pl_module.teacher}
            for name, task in self._ready.items():
                self._results[name] = {
                    speaker: task.ask(
                        model,
                        pl_module.device,
                        pl_module.data_ranks,
                        trainer.precision_plugin.forward_context,
                    )
                    for speaker, model in speakers.items()
                    if model is not None
                }
        for name, results in self._results.items():
            place = stage if name == NEXT else f"{stage}/{name}"
            pl_module.log_figures(
                {
                    f"{place}/{'teacher_' if speaker == 'teacher' else ''}{figure}": value
                    for speaker, result in results.items()
                    for figure, value in result.figures.items()
                }
            )
            draw = partial(draw_reliability, results=results, title=f"{name}, step {pl_module.trained_steps}")
            show_figure(trainer, f"{place}/reliability", draw, pl_module.trained_steps)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Forget the last validation and listen to this one."""
        self._start(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Log the figures of all ranks; ask the tasks if this validation's turn has come."""
        if not trainer.sanity_checking:
            every = self.every_n_validations
            self._finish(trainer, pl_module, "val", ask=every is not None and self._validations % every == 0)
            self._validations += 1

    def on_test_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Forget the last run and listen to this one."""
        self._start(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Log the figures of all ranks, and ask the tasks."""
        self._finish(trainer, pl_module, "test", ask=True)


def _bins(result: Calibration) -> list[dict[str, float]]:
    names = result.bins._fields
    rows = zip(*(values.tolist() for values in result.bins), strict=True)
    return [
        {**row, "count": int(row["count"])} for row in (dict(zip(names, r, strict=True)) for r in rows) if row["count"]
    ]
