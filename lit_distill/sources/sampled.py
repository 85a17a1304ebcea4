"""Responses sampled from one model while training: on-policy distillation (GKD) and live sequence-level distillation (SeqKD)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_distill.generation import SamplingParams
from lit_distill.generation.sampling import keyed_generator, run_seed
from lit_distill.sources.base import RolloutContext, Source, generate_responses, require_prompts
from lit_distill.sources.dataset import DatasetResponses
from lit_distill.sources.minibatches import check_phase, mini_batches
from lit_distill.types import check_sizes

if TYPE_CHECKING:
    from lit_distill.types import Batch, Sequences

OffPolicy = Literal["dataset", "teacher"]


class _SampledResponses(Source):
    """Responses of one model to the prompts of the batch, each used once; there is no gradient through sampling."""

    provides = DatasetResponses.provides
    model: Literal["student", "teacher"]

    def __init__(self, sampling: SamplingParams, seed: int | None, mini_batch_size: int | None = None) -> None:
        check_sizes(mini_batch_size=mini_batch_size)
        self.sampling = sampling
        self.seed = run_seed(seed)
        self.mini_batch_size = mini_batch_size

    def check_trainer(self, trainer: Any) -> None:
        """Reject mini-batches that are larger than the batch."""
        check_phase(self.mini_batch_size, trainer)

    def steps_per_batch(self, batch_size: int) -> int:
        """The mini-batches."""
        return -(-batch_size // (self.mini_batch_size or batch_size))

    def mini_batches(self, batch: Batch, context: RolloutContext) -> Iterator[Sequences]:
        """Generate the responses of the model."""
        yield from self._in_steps(self._responses(self.model, batch, context), context)

    def _responses(self, model: Literal["student", "teacher"], batch: Batch, context: RolloutContext) -> Sequences:
        prompts = require_prompts(batch, self)
        trajectories = generate_responses(model, batch, prompts, context, self.sampling, self.seed, phase=context.step)
        if model == self.model:  # callbacks receive no others
            context.on_rollouts(trajectories)
        return trajectories.sequences()

    def _in_steps(self, text: Sequences, context: RolloutContext) -> Iterator[Sequences]:
        if self.mini_batch_size is None:
            return iter([text])
        order_key = (self.seed, context.step)  # in a batch, items are sorted by length
        return mini_batches(text, self.mini_batch_size, 1, context.world_size, order_key)


class _StudentResponses(_SampledResponses):
    """Responses of the student in some batches, of the dataset or the teacher in the others."""

    model = "student"

    def __init__(
        self, sampling: SamplingParams, seed: int | None, off_policy: OffPolicy, mini_batch_size: int | None = None
    ) -> None:
        super().__init__(sampling, seed, mini_batch_size)
        if off_policy not in ("dataset", "teacher"):
            raise ValueError(f"off_policy: expected dataset or teacher, got {off_policy!r}.")
        self.off_policy = off_policy

    def check_trainer(self, trainer: Any) -> None:
        """Reject data without the responses that some batches need."""
        super().check_trainer(trainer)
        if self._uses_others and self.off_policy == "dataset" and not getattr(trainer.datamodule, "responses", True):
            raise ValueError(
                f"off_policy: some batches of {type(self).__name__} are the responses of the dataset, but the data has none. Set "
                "off_policy: teacher, or data.init_args.responses: true."
            )

    @property
    @abstractmethod
    def _uses_others(self) -> bool:
        """Whether some batches are not the student's."""

    def _other_responses(self, batch: Batch, context: RolloutContext) -> Iterator[Sequences]:
        if self.off_policy == "teacher":
            text = self._responses("teacher", batch, context)
        else:
            (text,) = DatasetResponses().mini_batches(batch, context)
        yield from self._in_steps(text, context)


class StudentRollouts(_StudentResponses):
    """GKD: the student's own responses in a share of the batches, the dataset's or the teacher's in the others.

    Which one a batch uses is random, depends on ``seed`` and the optimiser step only, and is the same on all ranks.

    Args:
        on_policy_fraction: λ, the share of batches in which the student generates, in [0, 1].
        max_new_tokens: longest response.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample from the k most probable tokens only; 0 samples from all.
        top_p: sample from the smallest set of tokens with this much probability.
        seed: seed of all random numbers; ``seed_everything`` by default.
        off_policy: whose responses the other batches have; the "teacher" needs prompts alone.
        mini_batch_size: responses of one optimiser step, over all ranks. The responses to a batch are generated together, which is
            faster for large batches; all but the first mini-batch learn from a student that is some steps older. By default the
            batch is one step.

    Source: Agarwal et al. 2023, https://arxiv.org/abs/2306.13649.
    """

    def __init__(
        self,
        on_policy_fraction: float = 1.0,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        off_policy: OffPolicy = "dataset",
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__(SamplingParams(max_new_tokens, temperature, top_k, top_p), seed, off_policy, mini_batch_size)
        if not 0 <= on_policy_fraction <= 1:
            raise ValueError(f"on_policy_fraction: expected a share in [0, 1], got {on_policy_fraction}.")
        self.on_policy_fraction = on_policy_fraction
        if off_policy == "teacher" and on_policy_fraction == 1:
            raise ValueError(
                "off_policy: teacher, but with on_policy_fraction: 1 every batch is the student's. Set on_policy_fraction below "
                "1, or remove off_policy."
            )
        self.needs_teacher = self._uses_others and off_policy == "teacher"
        untruncated = on_policy_fraction == 1 and top_k == 0 and top_p == 1 and mini_batch_size is None
        self.samples_at = temperature if untruncated and temperature > 0 else None

    @property
    def _uses_others(self) -> bool:
        return self.on_policy_fraction < 1

    def mini_batches(self, batch: Batch, context: RolloutContext) -> Iterator[Sequences]:
        """The student's responses, or the others."""
        uniform = float(torch.rand((), generator=keyed_generator(self.seed, context.step, "on-policy")))
        if uniform < self.on_policy_fraction:
            yield from super().mini_batches(batch, context)
        else:
            yield from self._other_responses(batch, context)


class TeacherRollouts(_SampledResponses):
    """Online SeqKD: the teacher generates the responses during training.

    For several epochs it is cheaper to generate them once with `predict` and to train on that file.

    Args:
        max_new_tokens: longest response.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample from the k most probable tokens only; 0 samples from all.
        top_p: sample from the smallest set of tokens with this much probability.
        seed: seed of all random numbers; ``seed_everything`` by default.
        mini_batch_size: responses of one optimiser step, over all ranks. The responses to a batch are generated together, which is
            faster for large batches. By default the batch is one step.

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
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__(SamplingParams(max_new_tokens, temperature, top_k, top_p), seed, mini_batch_size)
