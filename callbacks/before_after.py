"""Compares the student before training, further students, the student after training and the teacher on the test data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.callbacks.prompt_evaluator import generate_and_score
from lit_distill.evaluation.text_metrics import GenerationMetrics
from lit_distill.generation import SamplingParams
from lit_distill.models import ModelSpec, load_model
from lit_distill.models.fsdp import is_sharded
from lit_distill.types import ArgumentError, arguments_of

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule
    from lit_distill.types import Batch

BEFORE, AFTER, TEACHER = "student before", "student after", "teacher"
COLUMNS = {
    "perplexity": "perplexity",
    "reverse_kl": "reverse KL",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match %",
    "response_length": "tokens",
    "distinct_4": "distinct-4",
}


class BeforeAfter(Callback):
    """Evaluates the student before and after `fit`, and the teacher, on the test data, and prints a table.

    Args:
        max_new_tokens: longest response.
        temperature: sampling temperature; 0 is greedy.
        seed: seed of the sampling.
        others: further students by the name of their row, such as one that was trained without the teacher: a folder or hub id,
            of the same architecture.

    Raises:
        ValueError: if another student has the name of a row that there is already, cannot be loaded, or has another
            architecture; or if the student has adapters or is sharded, so that it cannot take the weights of another.
    """

    def __init__(
        self,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        others: Mapping[str, str] | None = None,
    ) -> None:
        self.sampling = SamplingParams(max_new_tokens, temperature)
        self.seed = seed
        self.others = dict(others or {})
        if taken := [name for name in self.others if name in (BEFORE, AFTER, TEACHER)]:
            raise ValueError(f"others: {taken[0]!r} is the name of a row that the table has. Give another name.")
        self.metrics: dict[str, dict[str, float]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Evaluate all but the trained student; a resumed run has their rows from its checkpoint."""
        trainer.datamodule.setup("test")  # type: ignore[attr-defined]
        if self.others and (pl_module.student_spec.lora is not None or is_sharded(pl_module.student)):
            raise ArgumentError(
                self,
                "others: a student with adapters, or sharded by fsdp2, cannot take the weights of another. Remove others.",
            )
        if not self.metrics:
            before = self._held_out(trainer, pl_module)
            steps = pl_module.trained_steps  # of a checkpoint without the rows
            row = f"student, step {steps}" if steps else BEFORE
            self.metrics[row] = before | self._generated(trainer, pl_module, "student")
            if pl_module.local_teacher is not None:  # the student's evaluation has computed the teacher's perplexity
                teacher = {"perplexity": before["teacher_perplexity"], "reverse_kl": 0.0} if before else {}
                self.metrics[TEACHER] = teacher | self._generated(trainer, pl_module, "teacher")
        for name in self.others:
            if name in self.metrics:
                continue
            with self._weights_of(pl_module, name):
                self.metrics[name] = self._held_out(trainer, pl_module) | self._generated(trainer, pl_module, "student")

    def on_fit_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Evaluate the trained student and print the table."""
        before = next(iter(self.metrics))
        after = self._held_out(trainer, pl_module) | self._generated(trainer, pl_module, "student")
        rows = {**self.metrics, AFTER: after}
        self.metrics = {name: rows[name] for name in (before, *self.others, AFTER, TEACHER) if name in rows}
        rank_zero_info("\n" + self.table())

    def state_dict(self) -> dict[str, Any]:
        """The rows of all but the trained student, and what they depend on."""
        rows = {name: row for name, row in self.metrics.items() if name != AFTER}
        return {"metrics": rows, "settings": self._settings(), "others": dict(self.others)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep these rows, unless they were computed with other settings or are of another model."""
        if state_dict["settings"] == self._settings():
            others = state_dict.get("others", {})
            changed = {name for name, path in others.items() if self.others.get(name) != path}
            self.metrics = {name: row for name, row in state_dict["metrics"].items() if name not in changed}

    def _settings(self) -> list[float]:
        return [self.sampling.max_new_tokens, self.sampling.temperature, self.seed]

    def table(self) -> str:
        """The metrics on held-out data as text, a row for each model; reverse KL to the teacher in nats per token."""
        width = max(16, *(len(name) + 1 for name in self.metrics))
        lines = [f"{'held out':{width}}" + "".join(f"{head:>15}" for head in COLUMNS.values())]
        for model, row in self.metrics.items():
            cells = [f"{row[name]:.3f}" if math.isfinite(row.get(name, math.nan)) else "-" for name in COLUMNS]
            lines.append(f"{model:{width}}" + "".join(f"{cell:>15}" for cell in cells))
        return "\n".join(lines)

    @contextmanager
    def _weights_of(self, pl_module: DistillationModule, name: str) -> Iterator[None]:
        """Inside the context, the student has the weights of another one."""
        key, path, student = f"others.{name}", self.others[name], pl_module.student.model
        with arguments_of(self):
            other = load_model(ModelSpec(path), key, student.dtype).state_dict()
        own = {name: weight.clone() for name, weight in student.state_dict().items()}
        shapes = [{name: weight.shape for name, weight in weights.items()} for weights in (own, other)]
        if shapes[0] != shapes[1]:
            differing = sorted(name for name in {**own, **other} if shapes[0].get(name) != shapes[1].get(name))
            raise ArgumentError(
                self,
                f"{key}: {path} has another architecture than the student ({differing[0]} is {shapes[1].get(differing[0])} "
                f"instead of {shapes[0].get(differing[0])}). Give a student of the same, or remove it.",
            )
        try:
            student.load_state_dict(other)
            yield
        finally:
            student.load_state_dict(own)

    def _batches(self, trainer: Trainer, pl_module: DistillationModule) -> Iterator[Batch]:
        for batch in trainer.datamodule.test_dataloader():  # type: ignore[attr-defined]
            yield batch.to(pl_module.device)

    @torch.no_grad()
    def _held_out(self, trainer: Trainer, pl_module: DistillationModule) -> dict[str, float]:
        pl_module.token_metrics.reset()
        with pl_module.student.eval_mode():
            for index, batch in enumerate(self._batches(trainer, pl_module)):
                with trainer.precision_plugin.val_step_context():
                    pl_module.validation_step(batch, index)
        metrics = pl_module.token_metrics.metrics()
        pl_module.token_metrics.reset()
        return {name: float(value) for name, value in metrics.items()}

    @torch.no_grad()
    def _generated(self, trainer: Trainer, pl_module: DistillationModule, model: str) -> dict[str, float]:
        scores = pl_module.over_ranks(GenerationMetrics())
        for batch in self._batches(trainer, pl_module):
            num_references = pl_module.sum_over_ranks(torch.tensor(len(batch.references), device=pl_module.device))
            if batch.prompts is None or not num_references:  # equal on all ranks: a sharded model generates on all
                continue
            with trainer.precision_plugin.val_step_context():
                generate_and_score(pl_module, batch, self.sampling, self.seed, model, scores)
        if not scores.update_called:
            return {}
        return {name: float(value) for name, value in scores.compute().items()}
