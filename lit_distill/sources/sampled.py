"""Responses sampled from one model while training: on-policy distillation (GKD) and live sequence-level distillation (SeqKD)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch

from lit_distill.generation import SamplingParams
from lit_distill.generation.sampling import keyed_generator, run_seed
from lit_distill.sources.base import RolloutContext, Source, generate_responses, require_prompts
from lit_distill.sources.dataset import DatasetResponses

if TYPE_CHECKING:
    from lit_distill.types import Batch, Sequences


class _SampledResponses(Source):
    """Responses of one model to the prompts of the batch, used for one step; there is no gradient through sampling."""

    provides = DatasetResponses.provides
    model: Literal["student", "teacher"]

    def __init__(self, sampling: SamplingParams, seed: int | None) -> None:
        self.sampling = sampling
        self.seed = run_seed(seed)

    def mini_batches(self, batch: Batch, context: RolloutContext) -> Iterator[Sequences]:
        """Generate the responses of the model."""
        prompts = require_prompts(batch, self)
        trajectories = generate_responses(
            self.model, batch, prompts, context, self.sampling, self.seed, phase=context.step
        )
        context.on_rollouts(trajectories)
        yield trajectories.sequences()


class StudentRollouts(_SampledResponses):
    """GKD: the student's own responses in a share of the batches, the dataset's in the others.

    Which one a batch uses is random, depends on ``seed`` and the optimiser step only, and is the same on all ranks.

    Args:
        on_policy_fraction: λ, the share of batches in which the student generates, in [0, 1].
        max_new_tokens: longest response.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample from the k most probable tokens only; 0 samples from all.
        top_p: sample from the smallest set of tokens with this much probability.
        seed: seed of all random numbers; ``seed_everything`` by default.

    Source: Agarwal et al. 2023, https://arxiv.org/abs/2306.13649.
    """

    model = "student"

    def __init__(
        self,
        on_policy_fraction: float = 1.0,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(SamplingParams(max_new_tokens, temperature, top_k, top_p), seed)
        if not 0 <= on_policy_fraction <= 1:
            raise ValueError(f"on_policy_fraction: expected a share in [0, 1], got {on_policy_fraction}.")
        self.on_policy_fraction = on_policy_fraction
        untruncated = on_policy_fraction == 1 and top_k == 0 and top_p == 1
        self.samples_at = temperature if untruncated and temperature > 0 else None
        self.dataset = DatasetResponses()

    def mini_batches(self, batch: Batch, context: RolloutContext) -> Iterator[Sequences]:
        """The student's responses, or the dataset's."""
        uniform = float(torch.rand((), generator=keyed_generator(self.seed, context.step, "on-policy")))
        if uniform < self.on_policy_fraction:
            yield from super().mini_batches(batch, context)
        else:
            yield from self.dataset.mini_batches(batch, context)


class TeacherRollouts(_SampledResponses):
    """Online SeqKD: the teacher generates the responses during training.

    For several epochs it is cheaper to generate them once with `predict` and to train on that file.

    Args:
        max_new_tokens: longest response.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample from the k most probable tokens only; 0 samples from all.
        top_p: sample from the smallest set of tokens with this much probability.
        seed: seed of all random numbers; ``seed_everything`` by default.

    Source: Kim and Rush 2016, https://arxiv.org/abs/1606.07947.
    """

    model = "teacher"
    needs_teacher = True

    def __init__(
        self,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(SamplingParams(max_new_tokens, temperature, top_k, top_p), seed)
