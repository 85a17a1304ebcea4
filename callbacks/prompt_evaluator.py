"""Base of the callbacks that generate from held-out prompts, the same prompts for any number of ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, Trainer

from lit_distill.types import Batch, check_sizes

if TYPE_CHECKING:
    from lit_distill.evaluation.text_metrics import GenerationMetrics
    from lit_distill.generation import SamplingParams
    from lit_distill.module import DistillationModule
    from lit_distill.types import Responses

Stage = Literal["val", "test"]


class PromptEvaluator(Callback, ABC):
    """Selects prompts, spread over the validation and test data, and passes them to the subclass.

    Args:
        max_prompts: about how many prompts of a split, spread over it; 0 switches the callback off, -1 takes all.
        every_n_validations: during `fit`, run at every n-th validation only; None runs at no validation.
    """

    needs_references = False
    """Whether batches without references are skipped."""

    def __init__(self, max_prompts: int, every_n_validations: int | None) -> None:
        if max_prompts < -1:
            raise ValueError(f"max_prompts: expected -1 (all), 0 (off) or more, got {max_prompts}.")
        check_sizes(every_n_validations=every_n_validations)
        self.max_prompts = max_prompts
        self.every_n_validations = every_n_validations
        self._validations = 0
        self._running = False

    @abstractmethod
    def on_start(self, trainer: Trainer, pl_module: DistillationModule, stage: Stage) -> None:
        """Reset the results before a validation or test."""

    @abstractmethod
    def on_batch(self, trainer: Trainer, pl_module: DistillationModule, batch: Batch) -> None:
        """Evaluate the selected prompts of a batch.

        It is called equally often on all ranks. A rank without selected items gets a batch with one prompt and no items, and must
        generate like the other ranks, since a model that is sharded over the ranks needs all of them.
        """

    @abstractmethod
    def on_end(self, trainer: Trainer, pl_module: DistillationModule, stage: Stage) -> None:
        """Log the results; called on all ranks."""

    def _select(
        self, trainer: Trainer, pl_module: DistillationModule, batch: Batch, num_batches: float
    ) -> Batch | None:
        if batch.prompts is None:
            return None
        here = torch.tensor([len(batch), len(batch.references)], device=pl_module.device)
        total, num_references = pl_module.sum_over_ranks(here).tolist()
        if not total or (self.needs_references and not num_references):
            return None
        if self.max_prompts < 0:
            return batch
        # The same number from each batch, since batches are sorted by length. Rank r of W has the items r, r + W, ... of a batch.
        count = min(total, math.ceil(self.max_prompts / num_batches))
        wanted = {i * total // count for i in range(count)}
        share = pl_module.data_ranks
        return batch.select([row for row in range(len(batch)) if row * share.number + share.rank in wanted])

    def _step(self, trainer: Trainer, pl_module: DistillationModule, batch: Batch, num_batches: float) -> None:
        if self._running and (selected := self._select(trainer, pl_module, batch, num_batches)) is not None:
            self.on_batch(trainer, pl_module, selected)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Start, if this is an n-th validation."""
        every = self.every_n_validations
        is_due = every is not None and (trainer.state.fn != "fit" or self._validations % every == 0)
        self._running = is_due and self.max_prompts != 0 and not trainer.sanity_checking
        if self._running:
            self.on_start(trainer, pl_module, "val")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: DistillationModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Evaluate the selected prompts of the batch."""
        self._step(trainer, pl_module, batch, trainer.num_val_batches[dataloader_idx])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Log the metrics over all ranks."""
        if self._running:
            self.on_end(trainer, pl_module, "val")
        self._validations += not trainer.sanity_checking

    def on_test_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Start."""
        self._running = self.max_prompts != 0
        if self._running:
            self.on_start(trainer, pl_module, "test")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: DistillationModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Evaluate the selected prompts of the batch."""
        self._step(trainer, pl_module, batch, trainer.num_test_batches[dataloader_idx])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Log the metrics over all ranks."""
        if self._running:
            self.on_end(trainer, pl_module, "test")

    def state_dict(self) -> dict[str, Any]:
        """The number of validations, so that a resumed run continues to count every n-th."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of validations."""
        self._validations = state_dict["validations"]


def generate_for_prompts(
    pl_module: DistillationModule, batch: Batch, sampling: SamplingParams, seed: int, model: str, sample: int = 0
) -> Responses:
    """Generate responses of student or teacher to a batch; on a rank without items, one dummy row that is masked out.

    Args:
        pl_module: the module with the models.
        batch: the prompts, and the items' ids.
        sampling: the sampling parameters.
        seed: seed of the sampling.
        model: student or teacher.
        sample: index among several responses to a prompt; number 0 is the one that `predict` generates with this seed.
    """
    assert batch.prompts is not None
    keys = tuple(f"{item}/{sample}" if sample else item for item in batch.ids) or ("",)
    return pl_module.generate(batch.prompts, keys, sampling, seed, model).masked_if_dummy(batch.ids)


def generate_and_score(
    pl_module: DistillationModule,
    batch: Batch,
    sampling: SamplingParams,
    seed: int,
    model: str,
    scores: GenerationMetrics,
) -> list[str]:
    """Generate responses, add them to ``scores``, and return their texts."""
    responses = generate_for_prompts(pl_module, batch, sampling, seed, model)
    count = len(batch)
    texts = pl_module.response_texts(responses)[:count]
    lengths = responses.mask.sum(dim=-1).tolist()[:count]
    finished = responses.finished(pl_module.stop_ids).tolist()[:count]
    scores.update(texts, batch.accepted, lengths, finished)
    return texts
