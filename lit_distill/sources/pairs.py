"""DPKD's source: pairs of a chosen response and a rejected one; the student generates the rejected one, or both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from lit_distill.generation import SamplingParams
from lit_distill.generation.sampling import run_seed
from lit_distill.objectives import PAIR_SIGNALS, TEACHER_OF_PAIRS, Objective
from lit_distill.sources.base import RolloutContext, Source, generate_responses, label_logprobs_of, require_prompts
from lit_distill.sources.dataset import DatasetResponses
from lit_distill.sources.minibatches import check_phase, mini_batches
from lit_distill.types import Pairs, Sequences, check_sizes

if TYPE_CHECKING:
    from torch import Tensor

    from lit_distill.teachers import LoadedTeacher
    from lit_distill.types import Batch


NO_RESPONSES = "chosen: the data has no responses. Set data.init_args.responses: true, or chosen: teacher."


class ResponsePairs(Source):
    """The chosen response comes from the dataset, the teacher or the student, which generates the rejected one for each batch.

    Objectives on tokens, such as `NextToken`, use the chosen response. A batch of ``data.init_args.batch_size`` prompts is a
    phase: the student generates again every ``batch_size / mini_batch_size * inner_epochs`` optimiser steps. If the batch is as
    large as the training data, that is once per epoch; ``decode_batch_size`` then limits the memory. Teacher responses that
    `predict` wrote to a file are used as a dataset. There is no gradient through sampling. Every random number is a function of
    ``seed``, the optimiser step and the item.

    Args:
        chosen: dataset; teacher, which then generates them during training; or ranked: the student generates ``num_responses``
            of which the teacher's most probable one is chosen and its least probable one rejected; a prompt to which all
            responses are the same is left out.
        num_responses: of ``ranked``: the student's responses to each prompt, at least 2.
        rank_by: of ``ranked``: the teacher's log-probability of a response per token, or its sum, which prefers short responses.
        mini_batch_size: pairs of one optimiser step, over all ranks; by default the whole batch.
        inner_epochs: number of passes over the pairs of a phase. With more than one, the teacher scores each pair only once.
        shuffle: shuffle the pairs for each inner epoch. Each rank shuffles its own, so the mini-batches depend on the number of
            ranks.
        max_new_tokens: longest response, of both models.
        temperature: of both models; 0 takes the most probable token.
        top_k: sample from the k most probable tokens only; 0 samples from all.
        top_p: sample from the smallest set of tokens with this much probability.
        decode_batch_size: responses decoded at a time on each rank; all at once by default.
        seed: seed of all random numbers; ``seed_everything`` by default.

    Source: DPKD, https://arxiv.org/abs/2406.19774.
    """

    provides = DatasetResponses.provides | (PAIR_SIGNALS - TEACHER_OF_PAIRS)
    provides_with_teacher = Source.provides_with_teacher | TEACHER_OF_PAIRS

    def __init__(
        self,
        chosen: Literal["dataset", "teacher", "ranked"] = "dataset",
        mini_batch_size: int | None = None,
        inner_epochs: int = 1,
        shuffle: bool = True,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        decode_batch_size: int | None = None,
        seed: int | None = None,
        num_responses: int = 4,
        rank_by: Literal["mean", "sum"] = "mean",
    ) -> None:
        if chosen not in ("dataset", "teacher", "ranked"):
            raise ValueError(f"chosen: expected dataset, teacher or ranked, got {chosen!r}.")
        if chosen == "ranked" and (num_responses < 2 or temperature == 0):
            raise ValueError(
                f"num_responses: ranked needs at least 2 different responses to a prompt, got {num_responses} at temperature "
                f"{temperature}."
            )
        if rank_by not in ("mean", "sum"):
            raise ValueError(f"rank_by: expected mean or sum, got {rank_by!r}.")
        check_sizes(mini_batch_size=mini_batch_size, inner_epochs=inner_epochs, decode_batch_size=decode_batch_size)
        self.chosen = chosen
        self.needs_teacher = chosen == "teacher"
        self.ranks_by_teacher = chosen == "ranked"
        self.num_responses = num_responses
        self.rank_by = rank_by
        self.mini_batch_size = mini_batch_size
        self.inner_epochs = inner_epochs
        self.shuffle = shuffle
        self.sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p)
        self.decode_batch_size = decode_batch_size
        self.seed = run_seed(seed)
        self._teacher_scores = False

    def check(self, objectives: Mapping[str, Objective]) -> None:
        """Reject a set of objectives without one on pairs; record whether one needs the teacher's log-probabilities."""
        if not any(objective.on_pairs for objective in objectives.values()):
            raise ValueError(
                "ResponsePairs lets the student generate responses that no objective uses. "
                "Add an objective on pairs, such as `dpkd: DirectPreference`, or set source: DatasetResponses or TeacherRollouts."
            )
        self._teacher_scores = any(objective.needs & TEACHER_OF_PAIRS for objective in objectives.values())

    def check_trainer(self, trainer: Any) -> None:
        """Reject mini-batches that are larger than the phase, and ``chosen: dataset`` for data without responses."""
        check_phase(self.mini_batch_size, trainer)
        if self.chosen == "dataset" and not getattr(trainer.datamodule, "responses", True):
            raise ValueError(NO_RESPONSES)

    def steps_per_batch(self, batch_size: int) -> int:
        """Inner epochs times mini-batches."""
        return self.inner_epochs * -(-batch_size // (self.mini_batch_size or batch_size))

    def mini_batches(self, batch: Batch, context: RolloutContext) -> Iterator[Pairs]:
        """Generate the rejected and, with ``chosen: teacher``, the chosen responses; yield the pairs ``inner_epochs`` times."""
        if self.chosen == "ranked":
            pairs = self._ranked(batch, context)
        else:
            rejected = self._responses("student", batch, context, "rejected")
            pairs = Pairs(self._chosen(batch, context), rejected)
        if self.inner_epochs > 1 and self._teacher_scores:
            pairs = self._scored(pairs, context.teacher)
        size = self.mini_batch_size or len(pairs) * context.world_size
        key = (self.seed, context.step) if self.shuffle else None
        yield from mini_batches(pairs, size, self.inner_epochs, context.world_size, key)

    def _chosen(self, batch: Batch, context: RolloutContext) -> Sequences:
        if self.chosen == "teacher":
            return self._responses("teacher", batch, context, "chosen")
        if batch.sequences is None:
            raise ValueError(NO_RESPONSES)
        return self._last_responses(batch, batch.sequences)

    def _ranked(self, batch: Batch, context: RolloutContext) -> Pairs:
        """The teacher's most and least probable one of the student's responses to each prompt."""
        assert context.teacher is not None
        candidates = [self._responses("student", batch, context, f"candidate {n}") for n in range(self.num_responses)]
        size = self.decode_batch_size or len(candidates[0])
        scores = []
        for text in candidates:
            total, lengths = label_logprobs_of(context.teacher, text, size).sum(dim=-1), text.target_mask.sum(dim=-1)
            scores.append(total / lengths.clamp(min=1) if self.rank_by == "mean" else total)
        ranking = torch.stack(scores)  # [candidates, B]
        chosen, rejected = (_picked(candidates, best) for best in (ranking.argmax(dim=0), ranking.argmin(dim=0)))
        differ = chosen.target_mask != rejected.target_mask
        differ |= (chosen.input_ids != rejected.input_ids) & chosen.target_mask
        kept = differ.any(dim=1, keepdim=True).cpu()
        return Pairs(*(text.with_targets(text.masks.targets & kept) for text in (chosen, rejected)))

    def _last_responses(self, batch: Batch, sequences: Sequences) -> Sequences:
        """The texts of the dataset with the response to their prompt as targets, as in the rejected ones, and no earlier turn."""
        sizes = require_prompts(batch, self).attention_mask.sum(dim=-1, keepdim=True)
        columns = torch.arange(sequences.input_ids.shape[1], device=sizes.device)
        targets = sequences.target_mask & (columns >= sizes)
        empty = [item for item, any_left in zip(batch.ids, targets.any(dim=-1).tolist(), strict=False) if not any_left]
        if empty:
            raise ValueError(
                f"ResponsePairs with chosen: dataset needs a response after each prompt, but {empty[0]} ends with its prompt. "
                "Remove such conversations, or set chosen: teacher."
            )
        return replace(sequences, target_mask=targets)

    def _responses(
        self,
        model: Literal["student", "teacher"],
        batch: Batch,
        context: RolloutContext,
        role: str,
    ) -> Sequences:
        prompts, phase = (
            require_prompts(batch, self),
            f"{context.step}/{role}",
        )  # different random numbers for chosen and rejected
        trajectories = generate_responses(
            model, batch, prompts, context, self.sampling, self.seed, phase, self.decode_batch_size
        )
        if role in ("rejected", "candidate 0"):  # callbacks receive the student's responses only, one of each prompt
            context.on_rollouts(trajectories)
        return trajectories.sequences()

    def _scored(self, pairs: Pairs, teacher: LoadedTeacher | None) -> Pairs:
        """Add the teacher's log-probability of every token; chosen and rejected responses share its forward passes."""
        assert teacher is not None
        text, width = pairs.concatenate(), pairs.chosen.input_ids.shape[1]
        scores = label_logprobs_of(teacher, text, 2 * (self.decode_batch_size or len(pairs)))
        chosen, rejected = scores[: len(pairs), :width], scores[len(pairs) :, : pairs.rejected.input_ids.shape[1]]
        return Pairs(
            replace(pairs.chosen, signals={"teacher_logprobs": chosen}),
            replace(pairs.rejected, signals={"teacher_logprobs": rejected}),
        )


def _picked(candidates: list[Sequences], index: Tensor) -> Sequences:
    """Row i of the candidate ``index[i]``, for every row; all have the same prompts, padded on the left to one width."""
    width = max(text.input_ids.shape[1] for text in candidates)
    rows = torch.arange(len(index), device=index.device)

    def pick(name: str) -> Tensor:
        padded = [F.pad(getattr(text, name), (0, width - text.input_ids.shape[1])) for text in candidates]
        return torch.stack(padded)[index, rows]

    return Sequences(pick("input_ids"), pick("attention_mask"), pick("target_mask"), items=candidates[0].items)
