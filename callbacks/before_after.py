"""Compares the student before training, the student after training and the teacher on the test data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.callbacks.prompt_evaluator import generate_and_score
from lit_distill.evaluation.text_metrics import GenerationMetrics
from lit_distill.generation import SamplingParams

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule
    from lit_distill.types import Batch

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
    """

    def __init__(self, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0) -> None:
        self.sampling = SamplingParams(max_new_tokens, temperature)
        self.seed = seed
        self.metrics: dict[str, dict[str, float]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Evaluate the teacher, and the student before training; a resumed run has these rows from its checkpoint."""
        trainer.datamodule.setup("test")  # type: ignore[attr-defined]
        if self.metrics:
            return
        before = self._held_out(trainer, pl_module)
        steps = pl_module.trained_steps  # of a checkpoint without the rows
        row = f"student, step {steps}" if steps else "student before"
        self.metrics[row] = before | self._generated(trainer, pl_module, "student")
        if pl_module.local_teacher is not None:  # the student's evaluation has computed the teacher's perplexity
            teacher = {"perplexity": before["teacher_perplexity"], "reverse_kl": 0.0} if before else {}
            self.metrics["teacher"] = teacher | self._generated(trainer, pl_module, "teacher")

    def on_fit_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Evaluate the trained student and print the table."""
        before, *teacher = self.metrics
        after = self._held_out(trainer, pl_module) | self._generated(trainer, pl_module, "student")
        self.metrics = {before: self.metrics[before], "student after": after, **{t: self.metrics[t] for t in teacher}}
        rank_zero_info("\n" + self.table())

    def state_dict(self) -> dict[str, Any]:
        """The rows of the student before training and of the teacher, and the settings that they depend on."""
        rows = {name: row for name, row in self.metrics.items() if name != "student after"}
        return {"metrics": rows, "settings": self._settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep these rows, unless they were computed with other settings."""
        if state_dict["settings"] == self._settings():
            self.metrics = dict(state_dict["metrics"])

    def _settings(self) -> list[float]:
        return [self.sampling.max_new_tokens, self.sampling.temperature, self.seed]

    def table(self) -> str:
        """The metrics on held-out data as text, a row for each model; reverse KL to the teacher in nats per token."""
        lines = [f"{'held out':16}" + "".join(f"{head:>15}" for head in COLUMNS.values())]
        for model, row in self.metrics.items():
            lines.append(f"{model:16}" + "".join(f"{row.get(name, float('nan')):>15.3f}" for name in COLUMNS))
        return "\n".join(lines)

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
