"""Student before, student after and teacher, side by side on the test data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lit_distill.callbacks.answers import answer_and_score

from lit_distill.evaluation.generation import ResponseScores
from lit_distill.rollouts import Decoding

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule
    from lit_distill.types import Batch

FIGURES = {
    "perplexity": "perplexity",
    "reverse_kl": "reverse KL",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match %",
    "response_length": "tokens",
    "distinct_4": "distinct-4",
}


class BeforeAfter(Callback):
    """Measures the student before and after `fit`, and the teacher, on the test data, and prints the table.

    Args:
        max_new_tokens: longest response.
        temperature: of the responses; 0 is greedy.
        seed: of the draws.
    """

    def __init__(self, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0) -> None:
        self.decoding = Decoding(max_new_tokens, temperature)
        self.seed = seed
        self.figures: dict[str, dict[str, float]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Measure the teacher and the student as it comes."""
        trainer.datamodule.setup("test")  # type: ignore[attr-defined]
        before = self._held_out(trainer, pl_module)
        self.figures["student before"] = before | self._generated(trainer, pl_module, "student")
        if pl_module.teacher is not None:  # what the pass over the texts has said of it already
            teacher = {"perplexity": before["teacher_perplexity"], "reverse_kl": 0.0} if before else {}
            self.figures["teacher"] = teacher | self._generated(trainer, pl_module, "teacher")

    def on_fit_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Measure the student as it has become, and print."""
        before, *teacher = self.figures
        after = self._held_out(trainer, pl_module) | self._generated(trainer, pl_module, "student")
        self.figures = {before: self.figures[before], "student after": after, **{t: self.figures[t] for t in teacher}}
        rank_zero_info("\n" + self.table())

    def table(self) -> str:
        """The figures on held-out data as text, a row for each model; reverse KL to the teacher in nats per token."""
        lines = [f"{'held out':16}" + "".join(f"{head:>15}" for head in FIGURES.values())]
        for model, row in self.figures.items():
            lines.append(f"{model:16}" + "".join(f"{row.get(name, float('nan')):>15.3f}" for name in FIGURES))
        return "\n".join(lines)

    def _batches(self, trainer: Trainer, pl_module: DistillationModule) -> Iterator[Batch]:
        for batch in trainer.datamodule.test_dataloader():  # type: ignore[attr-defined]
            yield batch.to(pl_module.device)

    @torch.no_grad()
    def _held_out(self, trainer: Trainer, pl_module: DistillationModule) -> dict[str, float]:
        pl_module.held_out.reset()
        with pl_module.student.quiet():
            for index, batch in enumerate(self._batches(trainer, pl_module)):
                with trainer.precision_plugin.val_step_context():
                    pl_module.validation_step(batch, index)
        figures = pl_module.held_out.figures()
        pl_module.held_out.reset()
        return {name: float(value) for name, value in figures.items()}

    @torch.no_grad()
    def _generated(self, trainer: Trainer, pl_module: DistillationModule, speaker: str) -> dict[str, float]:
        scores = pl_module.over_ranks(ResponseScores())
        for batch in self._batches(trainer, pl_module):
            answered = pl_module.sum_over_ranks(torch.tensor(len(batch.references), device=pl_module.device))
            if batch.prompts is None or not answered:  # all ranks or none, since a sharded model speaks on all of them
                continue
            with trainer.precision_plugin.val_step_context():
                answer_and_score(pl_module, batch, self.decoding, self.seed, speaker, scores)
        if not scores.update_called:
            return {}
        return {name: float(value) for name, value in scores.compute().items()}
