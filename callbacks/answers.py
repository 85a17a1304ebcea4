"""Prompts of held-out data that are to be answered: the same ones whatever the number of ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, Trainer

from lit_distill.types import Batch

if TYPE_CHECKING:
    from lit_distill.evaluation import ResponseScores
    from lit_distill.module import DistillationModule
    from lit_distill.rollouts import Decoding, Responses

Stage = Literal["val", "test"]


class PromptEvaluator(Callback, ABC):
    """Shows its subclass prompts that are spread over the validation and test data.

    Args:
        key: the callback's key in the YAML, for messages.
        max_prompts: about how many prompts of a split, spread over it; 0 switches the callback off, -1 takes all.
        every_n_validations: during `fit`, take part in every n-th validation only; None never takes part.
    """

    needs_references = False

    def __init__(self, key: str, max_prompts: int, every_n_validations: int | None) -> None:
        if max_prompts < -1:
            raise ValueError(f"{key}.max_prompts: expected -1 (all), 0 (off) or more, got {max_prompts}.")
        if every_n_validations is not None and every_n_validations < 1:
            raise ValueError(f"{key}.every_n_validations: expected at least 1, got {every_n_validations}.")
        self.max_prompts = max_prompts
        self.every_n_validations = every_n_validations
        self._validations = 0
        self._running = False

    @abstractmethod
    def begin(self, trainer: Trainer, pl_module: DistillationModule, stage: Stage) -> None:
        """Forget the last time."""

    @abstractmethod
    def measure(self, trainer: Trainer, pl_module: DistillationModule, batch: Batch) -> None:
        """Work on the chosen prompts of a batch.

        It is called equally often on all ranks. A rank whose share is empty sees one prompt and no items, and does with it what
        the others do, so that a model which is spread over the ranks can speak.
        """

    @abstractmethod
    def conclude(self, trainer: Trainer, pl_module: DistillationModule, stage: Stage) -> None:
        """Log what was found, on all ranks."""

    def _chosen(
        self, trainer: Trainer, pl_module: DistillationModule, batch: Batch, num_batches: float
    ) -> Batch | None:
        if batch.prompts is None:
            return None
        here = torch.tensor([len(batch), len(batch.references)], device=pl_module.device)
        total, answered = pl_module.sum_over_ranks(here).tolist()
        if not total or (self.needs_references and not answered):
            return None
        if self.max_prompts < 0:
            return batch
        # Evenly from all batches, since those are ordered by length; rank r of W has the items r, r + W, ... of a batch.
        count = min(total, math.ceil(self.max_prompts / num_batches))
        wanted = {i * total // count for i in range(count)}
        share = pl_module.data_ranks
        return batch.select([row for row in range(len(batch)) if row * share.number + share.rank in wanted])

    def _step(self, trainer: Trainer, pl_module: DistillationModule, batch: Batch, num_batches: float) -> None:
        if self._running and (chosen := self._chosen(trainer, pl_module, batch, num_batches)) is not None:
            self.measure(trainer, pl_module, chosen)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Begin, if this validation's turn has come."""
        every = self.every_n_validations
        turn = every is not None and (trainer.state.fn != "fit" or self._validations % every == 0)
        self._running = turn and self.max_prompts != 0 and not trainer.sanity_checking
        if self._running:
            self.begin(trainer, pl_module, "val")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: DistillationModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Work on the batch's prompts."""
        self._step(trainer, pl_module, batch, trainer.num_val_batches[dataloader_idx])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Log the figures of all ranks."""
        if self._running:
            self.conclude(trainer, pl_module, "val")
        self._validations += not trainer.sanity_checking

    def on_test_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Begin."""
        self._running = self.max_prompts != 0
        if self._running:
            self.begin(trainer, pl_module, "test")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: DistillationModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Work on the batch's prompts."""
        self._step(trainer, pl_module, batch, trainer.num_test_batches[dataloader_idx])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Log the figures of all ranks."""
        if self._running:
            self.conclude(trainer, pl_module, "test")

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were, so that a resumed run keeps their turns."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._validations = state_dict["validations"]


def answer(
    pl_module: DistillationModule, batch: Batch, decoding: Decoding, seed: int, speaker: str, sample: int = 0
) -> Responses:
    """What student or teacher answers to the batch's prompts; a rank without items decodes a row that counts nowhere.

    Args:
        pl_module: whose models.
        batch: the prompts, and the items' ids.
        decoding: how to draw.
        seed: of the draws.
        speaker: student or teacher.
        sample: which of several answers to the same prompt; answer 0 is the one that `predict` gives with this seed.
    """
    assert batch.prompts is not None
    keys = tuple(f"{item}/{sample}" if sample else item for item in batch.ids) or ("",)
    return pl_module.generate(batch.prompts, keys, decoding, seed, speaker).counted(batch.ids)


def answer_and_score(
    pl_module: DistillationModule, batch: Batch, decoding: Decoding, seed: int, speaker: str, scores: ResponseScores
) -> list[str]:
    """The answers as text, after adding them to ``scores``."""
    responses = answer(pl_module, batch, decoding, seed, speaker)
    count = len(batch)
    texts = pl_module.response_texts(responses)[:count]
    lengths = responses.mask.sum(dim=-1).tolist()[:count]
    finished = responses.finished(pl_module.stop_ids).tolist()[:count]
    scores.update(texts, batch.references, lengths, finished)
    return texts
