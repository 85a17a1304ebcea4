"""Generated responses to held-out prompts: how close they come to the references."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from lit_distill.callbacks.samples import show_samples

from lit_distill.evaluation.generation import ResponseScores
from lit_distill.rollouts import Decoding
from lit_distill.types import Batch

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule


class GenerationEvaluator(Callback):
    """Answers the prompts of the validation and test data and logs ``val/rouge_l`` and ``val/exact_match`` in percent.

    Args:
        max_prompts: about how many prompts of a split to answer, spread over it; 0 switches it off, -1 takes all.
        every_n_validations: during `fit`, answer at every n-th validation only.
        max_new_tokens: longest response.
        temperature: 0 is greedy.
        top_k: draw from the k most probable tokens only; 0 draws from all.
        top_p: draw from the smallest set of tokens with this much probability.
        seed: of the draws; together with an item's id it fixes the response.
        num_samples: how many responses to show as text in TensorBoard.
    """

    def __init__(
        self,
        max_prompts: int = 256,
        every_n_validations: int = 1,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        num_samples: int = 8,
    ) -> None:
        if max_prompts < -1:
            raise ValueError(f"generation.max_prompts: expected -1 (all), 0 (off) or more, got {max_prompts}.")
        if every_n_validations < 1:
            raise ValueError(f"generation.every_n_validations: expected at least 1, got {every_n_validations}.")
        self.max_prompts = max_prompts
        self.every_n_validations = every_n_validations
        self.decoding = Decoding(max_new_tokens, temperature, top_k, top_p)
        self.seed = seed
        self.num_samples = num_samples
        self._validations = 0
        self._answered = 0
        self._samples: list[tuple[str, str, str]] = []
        self._scores = ResponseScores()

    def _start(self, pl_module: DistillationModule) -> None:
        self._answered = 0
        self._samples = []
        self._scores.to(pl_module.device).reset()

    def _answer(self, trainer: Trainer, pl_module: DistillationModule, batch: Batch, num_batches: float) -> None:
        if batch.prompts is None or not batch.references:
            return
        if self.max_prompts >= 0:  # evenly from all batches, since those are ordered by length
            share = self.max_prompts / (num_batches * trainer.world_size)
            batch = batch.thinned(min(len(batch), math.ceil(share)))
        if not len(batch):
            return
        assert batch.prompts is not None
        self._answered += len(batch)
        responses = pl_module.generate(batch.prompts, batch.ids, self.decoding, self.seed)
        texts = pl_module.response_texts(responses)
        self._scores.update(texts, batch.references, responses.mask.sum(dim=-1).tolist())
        rows = zip(batch.prompt_texts, texts, (accepted[0] for accepted in batch.references), strict=True)
        self._samples = [*self._samples, *rows][: self.num_samples]

    def _finish(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        if not self._answered:
            return
        pl_module.log_figures({f"{stage}/{name}": value for name, value in self._scores.compute().items()})
        heads = ("prompt", "response", "reference")
        show_samples(trainer, f"{stage}/samples", heads, self._samples, pl_module.global_step)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Forget the last validation."""
        self._start(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: DistillationModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Answer the batch's prompts if this validation's turn has come."""
        if not trainer.sanity_checking and self._validations % self.every_n_validations == 0:
            self._answer(trainer, pl_module, batch, trainer.num_val_batches[dataloader_idx])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Log the figures of all ranks."""
        self._finish(trainer, pl_module, "val")
        self._validations += not trainer.sanity_checking

    def on_test_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Forget the last run."""
        self._start(pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: DistillationModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Answer the batch's prompts."""
        self._answer(trainer, pl_module, batch, trainer.num_test_batches[dataloader_idx])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Log the figures of all ranks."""
        self._finish(trainer, pl_module, "test")
