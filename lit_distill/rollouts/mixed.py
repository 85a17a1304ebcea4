"""MiniLLM's source: phases of teacher-mixed rollouts, each learnt from for several inner epochs of mini-batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lit_distill.objectives import Objective, PolicyGradient
from lit_distill.rollouts.decoding import Decoding, phase_uniforms, run_seed, stream
from lit_distill.rollouts.loop import Responses, decode_mixed
from lit_distill.rollouts.phases import KEY, check_phase, check_sizes, mini_batches
from lit_distill.rollouts.scoring import Scoring
from lit_distill.rollouts.sources import Players, Source
from lit_distill.rollouts.speaking import prompts_of
from lit_distill.rollouts.trajectories import Trajectories, join_responses

if TYPE_CHECKING:
    from lit_distill.models import FrozenTeacher
    from lit_distill.types import Batch, Sequences


class TeacherMixedRollouts(Source):
    """Responses drawn from p̃ = αp + (1−α)q; a batch of ``data.init_args.batch_size`` prompts is one phase.

    Every random number is a function of ``seed``, the optimiser step and the item, so a resumed run draws what an
    uninterrupted one would have drawn, and the number of ranks changes nothing. Prompts are all that is needed of the
    data.

    Args:
        alpha: share of the teacher in the sampler, in [0, 1]; a callback may schedule it.
        max_new_tokens: longest response.
        temperature: of both models; `PolicyGradient` must have the same.
        top_k: draw from the k most probable tokens only; with alpha 0.
        top_p: draw from the smallest set of tokens with this much probability; with alpha 0.
        mini_batch_size: rollouts of one optimiser step, over all ranks.
        inner_epochs: how often each rollout is learnt from.
        shuffle: mix the rollouts anew for each inner epoch; each rank its own, so that another number of ranks makes other
            mini-batches.
        decode_batch_size: rollouts decoded at a time on each rank, with coins of their own; all at once by default.
        hidden_on_host: keep the teacher's hidden rows in host memory between decoding and learning.
        scoring: from log-probabilities to advantages and weights; the paper's by default.
        seed: of all draws; by default ``seed_everything``.

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
        scoring: Scoring | None = None,
        seed: int | None = None,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"{KEY}.alpha: expected the teacher's share, in [0, 1], got {alpha}.")
        if not temperature > 0:
            raise ValueError(f"{KEY}.temperature: expected a number > 0, got {temperature}. Rollouts are sampled.")
        check_sizes(mini_batch_size=mini_batch_size, inner_epochs=inner_epochs, decode_batch_size=decode_batch_size)
        self.alpha = alpha
        self.decoding = Decoding(max_new_tokens, temperature, top_k, top_p)
        self.mini_batch_size = mini_batch_size
        self.inner_epochs = inner_epochs
        self.shuffle = shuffle
        self.decode_batch_size = decode_batch_size
        self.hidden_on_host = hidden_on_host
        self.scoring = scoring or Scoring()
        self.seed = run_seed(seed)
        self._check_truncation()

    def _check_truncation(self) -> None:
        truncated = self.decoding.top_k or self.decoding.top_p < 1
        if truncated and self.alpha > 0:
            raise ValueError(
                f"{KEY}.alpha: {self.alpha} with top_k {self.decoding.top_k} and top_p {self.decoding.top_p}. A truncated draw has "
                "no valid importance weight against the untruncated mixture. Set alpha: 0, or top_k: 0 and top_p: 1."
            )

    def check(self, objectives: Mapping[str, Objective]) -> None:
        """Refuse a policy gradient at another temperature than that of the rollouts."""
        for name, objective in objectives.items():
            if isinstance(objective, PolicyGradient) and objective.temperature != self.decoding.temperature:
                raise ValueError(
                    f"model.objectives.{name}.temperature is {objective.temperature}, but {KEY}.temperature, at which the rollouts "
                    f"are drawn, is {self.decoding.temperature}. Make them equal."
                )

    def check_trainer(self, trainer: Any) -> None:
        """Refuse mini-batches that are larger than the phase."""
        check_phase(self.mini_batch_size, trainer)

    def steps_per_batch(self, batch_size: int) -> int:
        """Inner epochs times mini-batches."""
        return self.inner_epochs * -(-batch_size // self.mini_batch_size)

    def mini_batches(self, batch: Batch, players: Players) -> Iterator[Sequences]:
        """Roll out, score, and go over the rollouts ``inner_epochs`` times."""
        trajectories = self.roll_out(batch, players)
        players.show(trajectories)
        key = (self.seed, players.step) if self.shuffle else None
        yield from mini_batches(
            trajectories.sequences(), self.mini_batch_size, self.inner_epochs, players.world_size, key
        )

    def roll_out(self, batch: Batch, players: Players) -> Trajectories:
        """One scored rollout per prompt of ``batch``."""
        prompts = prompts_of(batch, self)
        assert players.teacher is not None
        self._check_truncation()  # a schedule may have raised alpha
        start = time.perf_counter()
        size = self.decode_batch_size or len(prompts)
        parts = [
            self._decode(batch, players, players.teacher, first, first + size) for first in range(0, len(prompts), size)
        ]
        responses = join_responses(parts)
        return Trajectories(
            ids=batch.ids,
            prompt_texts=batch.prompt_texts,
            prompts=prompts,
            responses=responses,
            signals=self.scoring.signals(responses, self.alpha, players.sum_over_ranks),
            alpha=self.alpha,
            seconds=time.perf_counter() - start,
        )

    def _decode(self, batch: Batch, players: Players, teacher: FrozenTeacher, first: int, last: int) -> Responses:
        assert batch.prompts is not None
        steps = self.decoding.max_new_tokens
        prompts = batch.prompts.rows(first, last)
        coins = torch.rand(steps, generator=stream(self.seed, players.step, "coins", first)) < self.alpha
        uniforms = phase_uniforms(self.seed, players.step, batch.ids[first:last], steps)
        responses = decode_mixed(
            players.student, teacher, coins.tolist(), prompts, self.decoding, players.stop_ids, uniforms
        )
        return self._stored(responses.counted(batch.ids))

    def _stored(self, responses: Responses) -> Responses:
        if not self.hidden_on_host or responses.teacher_hidden is None:
            return responses
        return replace(responses, teacher_hidden=responses.teacher_hidden.cpu())
