"""MiniLLM's source: phases of teacher-mixed rollouts, used for several inner epochs of mini-batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lit_distill.generation import Decoder, SamplingParams
from lit_distill.generation.sampling import keyed_generator, phase_keys, run_seed
from lit_distill.objectives import ExtrapolatedReverseKL, Objective, PolicyGradient, ReverseKL
from lit_distill.sources.advantages import AdvantageConfig
from lit_distill.sources.base import RolloutContext, Source, in_decode_batches, label_logprobs_of, require_prompts
from lit_distill.sources.minibatches import check_phase, mini_batches
from lit_distill.sources.rewards import Reward, scores_of
from lit_distill.types import Responses, Trajectories, check_sizes, join_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from lit_distill.types import Batch, Prompts, Sequences


class TeacherMixedRollouts(Source):
    """Responses sampled from p̃ = αp + (1−α)q (teacher p, student q); a batch of ``data.init_args.batch_size`` prompts is a phase.

    Every random number is a function of ``seed``, the optimiser step and the item. So a resumed run samples the same tokens as
    an uninterrupted run, and the number of ranks does not change them. The data only has to provide prompts.

    Args:
        alpha: share of the teacher in the sampler, in [0, 1]; a callback may schedule it.
        max_new_tokens: longest response.
        temperature: of both models, > 0; `PolicyGradient` must have the same.
        top_k: sample from the k most probable tokens only; allowed only if alpha is 0.
        top_p: sample from the smallest set of tokens with this much probability; allowed only if alpha is 0.
        mini_batch_size: rollouts of one optimiser step, over all ranks.
        inner_epochs: number of passes over the rollouts of a phase.
        shuffle: shuffle the rollouts for each inner epoch. Each rank shuffles its own, so the mini-batches depend on the number
            of ranks.
        decode_batch_size: rollouts decoded at a time on each rank; all at once by default. Each decoding batch decides for
            itself at which steps the teacher samples.
        hidden_on_host: keep the teacher's hidden states in host memory between decoding and training.
        scoring: how advantages and importance weights are computed; as in the paper by default.
        rewards: scores of whole responses by name, such as a verifier's, each added to the teacher's reward with its ``weight``.
        seed: seed of all random numbers; ``seed_everything`` by default.

    Source: MiniLLM, https://arxiv.org/abs/2306.08543, algorithm 1.
    """

    provides = frozenset(
        {
            "student_logits",
            "labels",
            "old_logprobs",
            "teacher_logprobs",
            "advantages",
            "importance_weights",
            "single_step_weights",
        }
    )
    needs_teacher = True
    mixes_teacher = True

    def __init__(
        self,
        alpha: float = 0.2,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        mini_batch_size: int = 64,
        inner_epochs: int = 4,
        shuffle: bool = True,
        decode_batch_size: int | None = None,
        hidden_on_host: bool = False,
        scoring: AdvantageConfig | None = None,
        rewards: dict[str, Reward] | None = None,
        seed: int | None = None,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected the teacher's share, in [0, 1], got {alpha}.")
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number > 0, got {temperature}. Rollouts are sampled.")
        check_sizes(mini_batch_size=mini_batch_size, inner_epochs=inner_epochs, decode_batch_size=decode_batch_size)
        self.alpha = alpha
        self.sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p)
        self.mini_batch_size = mini_batch_size
        self.inner_epochs = inner_epochs
        self.shuffle = shuffle
        self.decode_batch_size = decode_batch_size
        self.hidden_on_host = hidden_on_host
        self.scoring = scoring or AdvantageConfig()
        self.rewards = rewards or {}
        if plain := [name for name, reward in self.rewards.items() if not hasattr(reward, "weight")]:
            kind = type(self.rewards[plain[0]]).__name__
            raise ValueError(f"rewards.{plain[0]}: call super().__init__(weight) in the constructor of {kind}.")
        self.needs_reference = self.scoring.extrapolation != 1
        self.seed = run_seed(seed)
        self._check_truncation()
        if self.needs_reference and temperature != 1:
            raise ValueError(
                f"temperature: {temperature}, but scoring.extrapolation: {self.scoring.extrapolation} compares log-probabilities "
                "at temperature 1. Set temperature: 1, or extrapolation: 1."
            )

    def _check_truncation(self) -> None:
        truncated = self.sampling.top_k or self.sampling.top_p < 1
        if truncated and self.alpha > 0:
            raise ValueError(
                f"alpha: {self.alpha} with top_k {self.sampling.top_k} and top_p {self.sampling.top_p}. Truncated "
                "sampling has no valid importance weight against the untruncated mixture. Set alpha: 0, or top_k: 0 and top_p: 1."
            )

    @property
    def fields(self) -> frozenset[str]:
        """Those of the rewards."""
        return frozenset().union(*(reward.fields for reward in self.rewards.values()))

    @property
    def description(self) -> str:
        """With its rewards."""
        rewards = ", ".join(f"{name}: {type(reward).__name__}" for name, reward in self.rewards.items())
        return f"{super().description} with rewards {rewards}" if rewards else super().description

    def check(self, objectives: Mapping[str, Objective]) -> None:
        """Reject objectives whose temperature or extrapolation differs from that of the rollouts."""
        if self.rewards and not any("advantages" in objective.needs for objective in objectives.values()):
            raise ValueError(
                f"rewards: no objective uses {', '.join(self.rewards)}. Add `long: PolicyGradient` to model.objectives."
            )
        for name, objective in objectives.items():
            scale = objective.scale if isinstance(objective, ExtrapolatedReverseKL) else 1.0
            is_single = isinstance(objective, ReverseKL | ExtrapolatedReverseKL)
            if is_single and scale != self.scoring.extrapolation:
                raise ValueError(
                    f"objectives.{name}: with scoring.extrapolation: {self.scoring.extrapolation}, the Single term is "
                    f"ExtrapolatedReverseKL with scale: {self.scoring.extrapolation}, got {type(objective).__name__} with "
                    f"scale {scale}. Set both to the same value (1 is ReverseKL)."
                )
            if isinstance(objective, PolicyGradient) and objective.temperature != self.sampling.temperature:
                raise ValueError(
                    f"objectives.{name}.temperature: {objective.temperature}, but the source samples at temperature "
                    f"{self.sampling.temperature}. Set both to the same value."
                )

    def check_trainer(self, trainer: Any) -> None:
        """Reject mini-batches that are larger than the phase."""
        check_phase(self.mini_batch_size, trainer)

    def steps_per_batch(self, batch_size: int) -> int:
        """Inner epochs times mini-batches."""
        return self.inner_epochs * -(-batch_size // self.mini_batch_size)

    def mini_batches(self, batch: Batch, context: RolloutContext) -> Iterator[Sequences]:
        """Generate and score the rollouts, then yield their mini-batches ``inner_epochs`` times."""
        trajectories = self.roll_out(batch, context)
        context.on_rollouts(trajectories)
        key = (self.seed, context.step) if self.shuffle else None
        yield from mini_batches(
            trajectories.sequences(context.needs), self.mini_batch_size, self.inner_epochs, context.world_size, key
        )

    def roll_out(self, batch: Batch, context: RolloutContext) -> Trajectories:
        """One scored rollout per prompt of ``batch``."""
        prompts = require_prompts(batch, self)
        self._check_truncation()  # a schedule may have raised alpha
        start = time.perf_counter()
        responses = in_decode_batches(
            batch, prompts, self.decode_batch_size, lambda *part: self._decode(context, *part)
        )
        scores = self._scores(batch, responses, context)
        weighted = [self.rewards[name].weight * values for name, values in scores.items()]
        return Trajectories(
            ids=batch.ids,
            prompt_texts=batch.prompt_texts,
            prompts=prompts,
            responses=responses,
            signals=self.scoring.signals(
                responses,
                self.alpha,
                context.sum_over_ranks,
                self._reference_logprobs(batch, prompts, responses, context),
                torch.stack(weighted).sum(dim=0) if weighted else None,
            ),
            alpha=self.alpha,
            seconds=time.perf_counter() - start,
            items=batch.items,
            scores=scores,
        )

    def _scores(self, batch: Batch, responses: Responses, context: RolloutContext) -> dict[str, Tensor]:
        if not self.rewards:
            return {}
        finished = responses.finished(context.stop_ids).tolist()
        return scores_of(self.rewards, batch, responses, context.response_texts(responses), finished)

    def _reference_logprobs(
        self, batch: Batch, prompts: Prompts, responses: Responses, context: RolloutContext
    ) -> Tensor | None:
        if not self.needs_reference:
            return None
        assert context.reference is not None
        text = join_prompts(prompts, replace(responses, teacher_hidden=None), {}, batch.items)
        scores = label_logprobs_of(context.reference, text, self.decode_batch_size or len(prompts))
        return scores[:, prompts.input_ids.shape[1] :]

    def _decode(self, context: RolloutContext, prompts: Prompts, items: tuple[str, ...], first: int) -> Responses:
        uniforms = torch.rand(
            self.sampling.max_new_tokens, generator=keyed_generator(self.seed, context.step, "coins", first)
        )
        decoder = context.generators["student"]
        assert isinstance(decoder, Decoder)
        responses = decoder.generate_mixed(
            prompts,
            phase_keys(context.step, items),
            self.sampling,
            self.seed,
            use_teacher=(uniforms < self.alpha).tolist(),
            entropies=context.entropies,
        )
        return self._offload_hidden(responses)

    def _offload_hidden(self, responses: Responses) -> Responses:
        if not self.hidden_on_host or responses.teacher_hidden is None:
            return responses
        return replace(responses, teacher_hidden=responses.teacher_hidden.cpu())
