"""Validation and test metrics: how well the student predicts held-out text, and how well it agrees with the teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_distill.evaluation.quality import AgreementTerms, PerplexityTerms, TermMeanMetric
from lit_distill.losses import ObjectiveEvaluator
from lit_distill.objectives import Objective

if TYPE_CHECKING:
    from lit_distill.models import CausalLM
    from lit_distill.teachers import LoadedTeacher, Teacher
    from lit_distill.types import Sequences

QUALITY = ".quality"  # no objective of a config has a dot in its name


def compares(teacher: Teacher | None) -> bool:
    """Whether the teacher's probabilities of all tokens are known, so that both divergences and its perplexity are finite."""
    return teacher is not None and teacher.knows_all_probabilities


def measurable(objectives: Mapping[str, Objective], has_teacher: bool) -> dict[str, Objective]:
    """The training objectives that can be evaluated on a dataset: they need only logits and labels, and mean something there."""
    known = {"student_logits", "labels", "reference_logits"} | ({"teacher_logits"} if has_teacher else set())
    return {
        name: objective
        for name, objective in objectives.items()
        if objective.needs <= known and objective.valid_on_any_text
    }


def metric_names(objectives: Mapping[str, Objective], teacher: Teacher | None) -> list[str]:
    """The names of `TokenMetrics.metrics`, available before any weights are loaded."""
    quality = AgreementTerms if compares(teacher) else PerplexityTerms
    trained = measurable(objectives, teacher is not None)
    names = dict.fromkeys([*trained, *(name for name in quality.metric_names if not name.endswith("nll"))])
    compared = ["teacher_perplexity"] if compares(teacher) else []
    return [*names, "perplexity", *compared, *(["loss"] if trained else [])]


class TokenMetrics(nn.Module):
    """Token-level metrics over the texts of all batches and ranks, with the training objectives that are `measurable`.

    Args:
        objectives: training objectives by name; the weighted sum of the measurable ones is the held-out ``loss``.
        student: the model to evaluate.
        teacher: the model to compare it with, if there is one.
        chunk_rows: rows of logits computed at a time.
        compared: whether to compare both models; false for a teacher that is not `compares`.
        reference: a second frozen model, if an objective needs it.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        student: CausalLM,
        teacher: LoadedTeacher | None,
        chunk_rows: int | None = None,
        compared: bool = True,
        reference: LoadedTeacher | None = None,
    ) -> None:
        super().__init__()
        self.trained = measurable(objectives, has_teacher=teacher is not None)
        self.compared = compared and teacher is not None
        quality = AgreementTerms() if self.compared else PerplexityTerms()
        evaluated: dict[str, Objective] = {QUALITY: quality, **self.trained}
        self.evaluator = ObjectiveEvaluator(evaluated, student, teacher, "model.objectives", chunk_rows, reference)
        self._warned = False
        self.means = TermMeanMetric((*quality.metric_names, *map(_of_objective, self.trained)))

    def attach(self, name: str, objective: Objective) -> None:
        """Evaluate ``objective`` on the same rows too, so that no model runs twice; its term does not change any metric.

        Args:
            name: name of the objective; a second objective with this name replaces the first.
            objective: may need ``student_logits``, ``labels`` and, if there is a teacher, ``teacher_logits``.
        """
        self.evaluator.objectives[f".{name}"] = objective

    def update(self, texts: Iterable[Sequences]) -> None:
        """Add the tokens of the texts."""
        for text in texts:
            _, terms = self.evaluator(text, dict.fromkeys(self.evaluator.objectives, 1.0))
            quality = terms[QUALITY]
            trained = {_of_objective(name): terms[name] for name in self.trained}
            totals = {**quality.metrics, **{name: term.total for name, term in trained.items()}}
            counts = {name: trained[name].count if name in trained else quality.count for name in totals}
            self.means.update(totals, counts)

    def metrics(self) -> dict[str, Tensor]:
        """The metrics by name, ``[]`` each; empty if there were no tokens. NaN and infinity are not replaced.

        A metric of the models goes before an objective of the same name: ``forward_kl`` is never that of another temperature.
        """
        if not self.means.update_called:  # equal on all ranks: the data have no responses
            return {}
        means = dict(self.means.compute())  # a copy: torchmetrics keeps the original
        if not means.pop("count"):
            return {}
        trained = {name: means.pop(_of_objective(name)) for name in self.trained}
        metrics = {**trained, **{name: mean for name, mean in means.items() if not name.endswith("nll")}}
        metrics["perplexity"] = means["nll"].exp()
        if "teacher_nll" in means:
            metrics["teacher_perplexity"] = means["teacher_nll"].exp()
            self._warn_of_chance(float(metrics["teacher_perplexity"]))
        if self.trained:
            losses = [objective.weight * trained[name] for name, objective in self.trained.items()]
            metrics["loss"] = torch.stack(losses).sum()
        return metrics

    def reset(self) -> None:
        """Reset the metrics."""
        self.means.reset()

    def _warn_of_chance(self, perplexity: float) -> None:
        """Warn once of a teacher that predicts the texts far worse than chance: one with random weights is a little worse."""
        vocabulary_size = self.evaluator.student.vocabulary_size
        if perplexity > 10 * vocabulary_size and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"model.teacher: its perplexity on the held-out texts is {perplexity:.3g}, far worse than chance over the "
                f"{vocabulary_size:,} tokens of the vocabulary, so it has nothing to teach. Its values may belong to other tokens: "
                "check its tokenizer, the template of the texts and, of a server, its model."
            )


def _of_objective(name: str) -> str:
    return f".{name}"
