"""Interface of sources: a source turns one batch of the data module into the mini-batches of the optimiser steps."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_distill.generation.sampling import phase_keys
from lit_distill.types import Sequences, Trajectories, join_responses

if TYPE_CHECKING:
    from torch import Tensor

    from lit_distill.generation import Generator, SamplingParams
    from lit_distill.models import CausalLM
    from lit_distill.objectives import Objective
    from lit_distill.sources.rewards import Reward
    from lit_distill.teachers import LoadedTeacher
    from lit_distill.types import Batch, Pairs, Prompts, Responses


TEXT_SIGNALS = frozenset({"student_logits", "labels"})
"""Signals that are available for any sequence."""


@dataclass(frozen=True)
class RolloutContext:
    """What a source needs for one batch: models, generators, the step and the ranks."""

    student: CausalLM
    teacher: LoadedTeacher | None
    generators: Mapping[str, Generator]
    """By model: ``student`` and, if the run has a teacher, ``teacher``. Each is a `Decoder` if the source mixes the teacher in."""
    step: int
    """Optimiser steps done so far. The seed and this step determine every random number of a phase."""
    total_steps: Callable[[], int]
    """Optimiser steps of the whole run. Call it only if it is needed: a run that is limited by time alone has no such number."""
    rank: int
    """Index of this data rank: rank r of W has the items r, r + W, … of every batch."""
    world_size: int
    """Number of ranks that share the data. Batch sizes in the YAML are totals over all of them."""
    sum_over_ranks: Callable[[Tensor], Tensor]
    """Sums a tensor over all ranks."""
    on_rollouts: Callable[[Trajectories], None]
    """Calls the hook ``on_rollouts`` of the Trainer's callbacks."""
    needs: frozenset[str] = frozenset()
    """The signals that the objectives need; other signals are not put into mini-batches."""
    entropies: bool = False
    """Whether a callback needs the entropies of teacher-mixed rollouts."""
    reference: LoadedTeacher | None = None
    """The second frozen model, if the run has one."""
    response_texts: Callable[[Responses], list[str]] = lambda _: []
    """The responses as strings, without special tokens."""
    stop_ids: tuple[int, ...] = ()
    """The tokens that end a response."""


def split_corpus(corpus: Sequences | None, steps: int) -> Iterator[Sequences]:
    """Divide the corpus rows of a batch evenly among its optimiser steps.

    Raises:
        ValueError: if there is no corpus, or fewer rows than steps.
    """
    if corpus is None:
        raise ValueError(
            "corpus_objectives: there is no corpus. Set data.init_args.corpus; for your own text it takes a path."
        )
    if len(corpus) < steps:
        raise ValueError(
            f"data.init_args.corpus.batch_size: {len(corpus)} rows on each rank, but a batch has {steps} optimiser steps. Set at "
            "least one row per step and rank."
        )
    bounds = [len(corpus) * step // steps for step in range(steps + 1)]
    yield from (corpus.slice(first, last) for first, last in pairwise(bounds))


class Source(ABC):
    """Provides the sequences of each optimiser step, and decides how often each sequence is used."""

    provides: frozenset[str]
    """The signals that come with its sequences."""
    provides_with_teacher: frozenset[str] = frozenset({"teacher_logits"})
    """Further signals if the run has a teacher."""
    needs_teacher = False
    """Whether the source uses the teacher to generate or to score responses."""
    generates = True
    """Whether it may yield texts that are not in the data."""
    ranks_by_teacher = False
    """Whether the source compares responses by the teacher's probability of them."""
    needs_reference = False
    """Whether the source scores responses with the reference model."""
    samples_at: float | None = None
    """The temperature at which the student of this very step has sampled every token, untruncated; None if that is not so."""
    keeps_items = True
    """Whether its texts know the record that they belong to."""
    mixes_teacher = False
    """Whether the teacher samples some of the tokens of a response, which only the project's own decoder can do."""
    rewards: Mapping[str, Reward] = MappingProxyType({})
    """Rewards of whole responses, by name."""
    reads_prompts = True
    """Whether the source needs the prompts of a batch, padded on the left for decoding."""

    @property
    def fields(self) -> frozenset[str]:
        """Fields of the records that it needs."""
        return frozenset()

    @property
    def description(self) -> str:
        """Its class, and those of its parts; a resumed run says if it has changed."""
        return type(self).__name__

    @abstractmethod
    def mini_batches(self, batch: Batch, context: RolloutContext) -> Iterator[Sequences | Pairs]:
        """Yield the sequences of one optimiser step after the other, made from ``batch``.

        Raises:
            ValueError: if the batch lacks what the source needs.
        """

    def steps_per_batch(self, batch_size: int) -> int:
        """Number of optimiser steps for a batch of ``batch_size`` items over all ranks."""
        return 1

    def check(self, objectives: Mapping[str, Objective]) -> None:  # noqa: B027 - most sources accept any
        """Reject objectives whose settings contradict those of the source, before anything loads.

        Raises:
            ValueError: with both keys.
        """

    def check_trainer(self, trainer: Any) -> None:  # noqa: B027
        """Reject, before anything loads, a Trainer or a data module that lacks what the source needs to fit.

        Raises:
            ValueError: with the key.
        """

    def observe_validation(self, metrics: Mapping[str, Tensor]) -> None:  # noqa: B027
        """React to the metrics of a validation during `fit`. They are equal on all ranks; ``loss`` is the loss of the objectives.

        Raises:
            ValueError: if a metric that the source needs is missing.
        """

    def metrics(self) -> dict[str, float]:
        """Metrics to log under ``rollout/`` at an optimiser step; they must be equal on all ranks."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint, equal on all ranks: tensors and numbers, and lists and dictionaries of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore the state from `state_dict`; ``state`` is empty if the checkpoint was written with another source."""


def require_prompts(batch: Batch, source: Source) -> Prompts:
    """The prompts of the batch.

    Raises:
        ValueError: if the batch has no prompts.
    """
    if batch.prompts is None:
        raise ValueError(f"source: {type(source).__name__} needs prompts, but the data module provides none.")
    return batch.prompts


def in_decode_batches(
    batch: Batch,
    prompts: Prompts,
    decode_batch_size: int | None,
    generate: Callable[[Prompts, tuple[str, ...], int], Responses],
) -> Responses:
    """Responses to all prompts of a batch, generated a decoding batch at a time; the dummy row of a rank without items is masked.

    Args:
        batch: the items.
        prompts: of the batch.
        decode_batch_size: responses generated at a time; all at once by default.
        generate: called with the prompts of a decoding batch, the ids of its items and the index of its first prompt.
    """
    size = decode_batch_size or len(prompts)
    parts = []
    for first in range(0, len(prompts), size):
        items = batch.ids[first : first + size]
        parts.append(generate(prompts.slice(first, first + size), items, first).masked_if_dummy(items))
    return join_responses(parts)


@torch.no_grad()
def label_logprobs_of(model: LoadedTeacher, text: Sequences, size: int) -> Tensor:
    """The log-probability of every target of a text under a frozen model, ``[B, S]`` float32; 0 elsewhere.

    Args:
        model: the model.
        text: the texts ``[B, S]``.
        size: texts of a forward pass.
    """
    scores = torch.zeros(text.input_ids.shape, device=text.input_ids.device)
    for first in range(0, len(text), size):
        part = slice(first, first + size)
        here = Sequences(
            text.input_ids[part], text.attention_mask[part], text.target_mask[part], items=text.items[part]
        )
        labels = here.input_ids.flatten()[here.target_index]
        scores[part] = scores[part].masked_scatter(here.target_mask, model.rows(here).label_logprobs(labels))
    return scores


def generate_responses(
    model: Literal["student", "teacher"],
    batch: Batch,
    prompts: Prompts,
    context: RolloutContext,
    sampling: SamplingParams,
    seed: int,
    phase: int | str,
    decode_batch_size: int | None = None,
) -> Trajectories:
    """Generate one model's responses to the prompts of a batch.

    A rank without items generates for a dummy prompt, so that collective operations do not hang; its response is masked out.

    Args:
        model: the model that generates.
        batch: the items.
        prompts: the prompts of the batch.
        context: generators of this run.
        sampling: sampling parameters.
        seed: seed of the random numbers.
        phase: together with ``seed`` and the id of an item, it determines the random numbers of that item.
        decode_batch_size: number of responses to decode at a time; all at once by default.
    """
    start = time.perf_counter()
    generator = context.generators[model]
    responses = in_decode_batches(
        batch,
        prompts,
        decode_batch_size,
        lambda part, items, _: generator.generate(part, phase_keys(phase, items), sampling, seed),
    )
    return Trajectories(
        ids=batch.ids,
        prompt_texts=batch.prompt_texts,
        prompts=prompts,
        responses=responses,
        signals={},
        alpha=float(model == "teacher"),
        seconds=time.perf_counter() - start,
        items=batch.items,
    )
