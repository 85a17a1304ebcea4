"""Calibration of the student's next-token predictions and of its answers to classification tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer

from lit_distill.callbacks.figures import show_figure
from lit_distill.evaluation.calibration import Calibration, PairConfidence, StudentConfidence
from lit_distill.evaluation.token_metrics import compares
from lit_distill.evaluation.verbalizer import Verbalizer, VerbalizerTask
from lit_distill.report.figures import Reliability, draw_reliability
from lit_distill.types import arguments_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lit_distill.module import DistillationModule

NEXT = "next token"
STYLES = {"teacher": 0, "student": 1}


class CalibrationMonitor(Callback):
    """Logs how well confidence and accuracy agree, for student and teacher, with reliability diagrams.

    ``ece``: mean gap between confidence and accuracy over bins of equal width; ``adaptive_ece``: over bins of equal mass;
    ``brier``: squared distance between the predicted distribution and the true class, summed over all classes (0 to 2);
    ``accuracy`` of the most probable prediction. Metrics of next tokens are ``val/ece``, ``val/teacher_ece`` …; those of a task are
    ``test/<task>/ece`` …, and ``mass``, the total probability of all its label words before renormalisation.

    Args:
        num_bins: number of bins of the calibration errors and the diagrams.
        next_token: evaluate the next tokens of held-out responses at every validation and test, in the forward passes that
            run there anyway.
        tasks: classification tasks with label words, by name; evaluated at `test`.
        every_n_validations: evaluate the tasks at every n-th validation too.

    Raises:
        ValueError: with the key.
    """

    def __init__(
        self,
        num_bins: int = 15,
        next_token: bool = True,
        tasks: dict[str, Verbalizer] | None = None,
        every_n_validations: int | None = None,
    ) -> None:
        if num_bins < 2:
            raise ValueError(f"num_bins: expected at least 2, got {num_bins}.")
        if every_n_validations is not None and every_n_validations < 1:
            raise ValueError(f"every_n_validations: expected at least 1, or null for never, got {every_n_validations}.")
        self.num_bins = num_bins
        self.next_token = next_token
        self.tasks = dict(tasks or {})
        self.every_n_validations = every_n_validations
        self._validations = 0
        self._ready: dict[str, VerbalizerTask] = {}
        self._next_token_metric: StudentConfidence | PairConfidence | None = None
        self._results: dict[str, dict[str, Calibration]] = {}

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Read the tasks, so that their errors are raised before any weights load."""
        if stage == "test" or (self.every_n_validations and stage in {"fit", "validate"}):
            for name, task in self.tasks.items():
                with arguments_of(task):
                    self._ready[name] = VerbalizerTask(task, pl_module.tokenizer, self.num_bins)

    def metric_names(self, trainer: Trainer, pl_module: DistillationModule) -> list[str]:
        """Names of the metrics that a validation logs; does not need the weights."""
        metrics = ["ece", "adaptive_ece", "accuracy", "brier"]
        responses = getattr(trainer.datamodule, "validates_responses", True)  # type: ignore[attr-defined]
        places = {"val": metrics} if self.next_token and responses else {}
        places |= {f"val/{task}": [*metrics, "mass"] for task in self.tasks if self.every_n_validations}
        models = ["", "teacher_"] if compares(pl_module.teacher_config) else [""]
        return [
            f"{place}/{model}{name}"
            for place, names in places.items()
            for model in (models if place == "val" or pl_module.teacher_spec else [""])
            for name in names
        ]

    def report(self) -> dict[str, Any]:
        """Results of the last validation or test for each model; empty bins are left out."""
        entries = [
            {
                "name": name,
                "role": role,
                **{metric: float(value) for metric, value in result.metrics.items()},
                "count": int(result.count),
                "bins": _bins(result),
            }
            for name, models in self._results.items()
            for role, result in models.items()
        ]
        return {"calibration": entries} if entries else {}

    def _start(self, pl_module: DistillationModule) -> None:
        self._results = {}
        if not self.next_token:
            return
        if self._next_token_metric is None:
            metric_class = PairConfidence if pl_module.token_metrics.compared else StudentConfidence
            self._next_token_metric = metric_class(self.num_bins)
            pl_module.token_metrics.attach("calibration", self._next_token_metric)
        for metric in self._next_token_metric.models.values():
            pl_module.over_ranks(metric).reset()

    def _finish(self, trainer: Trainer, pl_module: DistillationModule, stage: str, evaluate_tasks: bool) -> None:
        if self._next_token_metric is not None:
            metrics = self._next_token_metric.models
            if metrics["student"].update_called:  # equal on all ranks: false if the data have no responses
                self._results[NEXT] = {role: metric.compute() for role, metric in metrics.items()}
        if evaluate_tasks:
            models = {"student": pl_module.student, "teacher": pl_module.local_teacher}
            for name, task in self._ready.items():
                share = (pl_module.device, pl_module.data_ranks, trainer.precision_plugin.forward_context)
                with arguments_of(self.tasks[name]):
                    self._results[name] = {role: task.ask(model, *share) for role, model in models.items() if model}
        for name, results in self._results.items():
            place = stage if name == NEXT else f"{stage}/{name}"
            pl_module.log_metrics_at_step(
                {
                    f"{place}/{'teacher_' if role == 'teacher' else ''}{metric}": value
                    for role, result in results.items()
                    for metric, value in result.metrics.items()
                }
            )
            title = f"{name}, step {pl_module.trained_steps}"
            show_figure(trainer, f"{place}/reliability", reliability_diagram(results, title), pl_module.trained_steps)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Reset the results and metrics."""
        self._start(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Log the metrics over all ranks; evaluate the tasks at every n-th validation."""
        if not trainer.sanity_checking:
            every = self.every_n_validations
            self._finish(trainer, pl_module, "val", evaluate_tasks=every is not None and self._validations % every == 0)
            self._validations += 1

    def on_test_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Reset the results and metrics."""
        self._start(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Log the metrics over all ranks, and evaluate the tasks."""
        self._finish(trainer, pl_module, "test", evaluate_tasks=True)


def reliability_diagram(results: Mapping[str, Calibration], title: str) -> Callable[[Figure], None]:
    """What draws the calibration of student and teacher on the same axes of an empty figure."""
    models = [
        Reliability(
            f"{role}: ECE {float(result.metrics['ece']):.3f}, accuracy {float(result.metrics['accuracy']):.3f}",
            STYLES[role],
            _bins(result),
        )
        for role, result in results.items()
    ]
    return lambda figure: draw_reliability(figure, models, title)


def _bins(result: Calibration) -> list[dict[str, float]]:
    names = result.bins._fields
    rows = zip(*(values.tolist() for values in result.bins), strict=True)
    return [
        {**row, "count": int(row["count"])} for row in (dict(zip(names, r, strict=True)) for r in rows) if row["count"]
    ]
