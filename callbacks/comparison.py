"""Student before, student after and teacher, side by side on the test data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.evaluation.generation import ResponseScores
from lit_distill.rollouts import Decoding

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule

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
        self.figures["student before"] = self._measure(trainer, pl_module, "student")
        if pl_module.teacher is not None:
            self.figures["teacher"] = self._measure(trainer, pl_module, "teacher")

    def on_fit_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Measure the student as it has become, and print."""
        before, *teacher = self.figures
        after = self._measure(trainer, pl_module, "student")
        self.figures = {before: self.figures[before], "student after": after, **{t: self.figures[t] for t in teacher}}
        rank_zero_info("\n" + self.table())

    def table(self) -> str:
        """The figures on held-out data as text, a row for each model; reverse KL to the teacher in nats per token."""
        lines = [f"{'held out':16}" + "".join(f"{head:>15}" for head in FIGURES.values())]
        for model, row in self.figures.items():
            lines.append(f"{model:16}" + "".join(f"{row.get(name, float('nan')):>15.3f}" for name in FIGURES))
        return "\n".join(lines)

    @torch.no_grad()
    def _measure(self, trainer: Trainer, pl_module: DistillationModule, speaker: str) -> dict[str, float]:
        scores = ResponseScores().to(pl_module.device)
        pl_module.held_out.reset()
        was_training = pl_module.student.training
        pl_module.student.eval()
        for index, batch in enumerate(trainer.datamodule.test_dataloader()):  # type: ignore[attr-defined]
            here = batch.to(pl_module.device)
            with trainer.precision_plugin.val_step_context():
                pl_module.validation_step(here, index)
                if here.prompts is None or not here.references:
                    continue
                responses = pl_module.generate(here.prompts, here.ids, self.decoding, self.seed, speaker)
            scores.update(pl_module.response_texts(responses), here.references, responses.mask.sum(dim=-1).tolist())
        pl_module.student.train(was_training)
        figures = pl_module.held_out.figures()
        pl_module.held_out.reset()
        if speaker == "teacher":
            figures |= {"perplexity": figures["teacher_perplexity"], "reverse_kl": torch.tensor(0.0)}
        figures |= scores.compute()
        return {name: float(value) for name, value in figures.items()}
