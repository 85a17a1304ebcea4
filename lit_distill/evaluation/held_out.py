"""The figures of a validation or a test: how well the student predicts held-out text and agrees with its teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_distill.evaluation.quality import AgreementQuality, StudentQuality, TermMeans
from lit_distill.models import Measurement
from lit_distill.objectives import Objective

if TYPE_CHECKING:
    from lit_distill.models import CausalLM, FrozenTeacher
    from lit_distill.types import Sequences

QUALITY = ".quality"  # no objective of a config has a dot in its name


def measurable(objectives: Mapping[str, Objective], has_teacher: bool) -> dict[str, Objective]:
    """Of the training objectives those that a dataset can feed."""
    known = {"student_logits", "labels"} | ({"teacher_logits"} if has_teacher else set())
    return {name: objective for name, objective in objectives.items() if objective.needs <= known}


def metric_names(objectives: Mapping[str, Objective], has_teacher: bool) -> list[str]:
    """What `HeldOut.figures` will hold, known before any weights load."""
    quality, trained = AgreementQuality if has_teacher else StudentQuality, measurable(objectives, has_teacher)
    names = [name for name in (*quality.metric_names, *trained) if not name.endswith("nll")]
    return [*names, "perplexity", *(["teacher_perplexity"] if has_teacher else []), *(["loss"] if trained else [])]


class HeldOut(nn.Module):
    """Token-level figures over the texts of all batches and ranks, with the training objectives that a dataset can feed.

    Args:
        objectives: of the training, by name; their weighted sum is the held-out ``loss``.
        student: who is measured.
        teacher: whom it is compared with, if there is one.
        chunk_rows: rows of logits at a time.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        student: CausalLM,
        teacher: FrozenTeacher | None,
        chunk_rows: int | None = None,
    ) -> None:
        super().__init__()
        self.trained = measurable(objectives, has_teacher=teacher is not None)
        quality = AgreementQuality() if teacher else StudentQuality()
        measured: dict[str, Objective] = {QUALITY: quality, **self.trained}
        self.measure = Measurement(measured, student, teacher, "model.objectives", chunk_rows)
        self.means = TermMeans((*quality.metric_names, *self.trained))

    def listen(self, name: str, objective: Objective) -> None:
        """Show ``objective`` the same rows from now on, so that no model runs twice; its term counts nowhere.

        Args:
            name: of who listens; a second objective of that name replaces the first.
            objective: may ask for ``student_logits``, ``labels`` and, where there is a teacher, ``teacher_logits``.
        """
        self.measure.objectives[f".{name}"] = objective

    def update(self, texts: Iterable[Sequences]) -> None:
        """Add texts."""
        for text in texts:
            _, terms = self.measure(text, dict.fromkeys(self.measure.objectives, 1.0))
            quality = terms[QUALITY]
            totals = {**quality.metrics, **{name: terms[name].total for name in self.trained}}
            counts = {name: terms[name].count if name in self.trained else quality.count for name in totals}
            self.means.update(totals, counts)

    def figures(self) -> dict[str, Tensor]:
        """``[]`` each, by name; nothing where no token was counted. NaN and infinity are left as they are."""
        means = dict(self.means.compute())  # a copy: torchmetrics keeps the original
        if not means.pop("count"):
            return {}
        figures = {name: mean for name, mean in means.items() if not name.endswith("nll")}
        figures["perplexity"] = means["nll"].exp()
        if "teacher_nll" in means:
            figures["teacher_perplexity"] = means["teacher_nll"].exp()
        if self.trained:
            losses = [objective.weight * means[name] for name, objective in self.trained.items()]
            figures["loss"] = torch.stack(losses).sum()
        return figures

    def reset(self) -> None:
        """Forget all texts."""
        self.means.reset()
