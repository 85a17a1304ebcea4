"""Responses sampled from one model while training: on-policy distillation (GKD) and live sequence-level distillation (SeqKD)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch

from lit_distill.rollouts.decoding import Decoding, run_seed, stream
from lit_distill.rollouts.phases import KEY
from lit_distill.rollouts.sources import DatasetResponses, Players, Source
from lit_distill.rollouts.speaking import answers, prompts_of

if TYPE_CHECKING:
    from lit_distill.types import Batch, Sequences


class _SampledResponses(Source):
    """Responses of one speaker to the batch's prompts, each used for one step; nothing is differentiated through sampling."""

    provides = DatasetResponses.provides
    speaker: Literal["student", "teacher"]

    def __init__(self, decoding: Decoding, seed: int | None) -> None:
        self.decoding = decoding
        self.seed = run_seed(seed)

    def mini_batches(self, batch: Batch, players: Players) -> Iterator[Sequences]:
        """What the speaker answers."""
        who = players.teacher if self.speaker == "teacher" else players.student
        assert who is not None
        draws = (self.seed, players.step)
        trajectories = answers(who, batch, prompts_of(batch, self), players, self.decoding, draws)
        players.show(trajectories)
        yield trajectories.sequences()


class StudentRollouts(_SampledResponses):
    """GKD: the student's own responses in a share of the batches, the dataset's in the others.

    The coin of a batch is a function of ``seed`` and the optimiser step, the same on all ranks.

    Args:
        on_policy_fraction: λ, the share of batches in which the student speaks, in [0, 1].
        max_new_tokens: longest response.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw from the k most probable tokens only; 0 draws from all.
        top_p: draw from the smallest set of tokens with this much probability.
        seed: of all draws; by default ``seed_everything``.

    Source: Agarwal et al. 2023, https://arxiv.org/abs/2306.13649.
    """

    speaker = "student"

    def __init__(
        self,
        on_policy_fraction: float = 1.0,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(Decoding(max_new_tokens, temperature, top_k, top_p), seed)
        if not 0 <= on_policy_fraction <= 1:
            raise ValueError(f"{KEY}.on_policy_fraction: expected a share in [0, 1], got {on_policy_fraction}.")
        self.on_policy_fraction = on_policy_fraction
        self.dataset = DatasetResponses()

    def mini_batches(self, batch: Batch, players: Players) -> Iterator[Sequences]:
        """What the student answers, or the dataset."""
        coin = float(torch.rand((), generator=stream(self.seed, players.step, "on-policy")))
        if coin < self.on_policy_fraction:
            yield from super().mini_batches(batch, players)
        else:
            yield from self.dataset.mini_batches(batch, players)


class TeacherRollouts(_SampledResponses):
    """SeqKD, live: the teacher's responses. `predict` samples them once to a file instead, which is cheaper over several epochs.

    Args:
        max_new_tokens: longest response.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw from the k most probable tokens only; 0 draws from all.
        top_p: draw from the smallest set of tokens with this much probability.
        seed: of all draws; by default ``seed_everything``.

    Source: Kim and Rush 2016, https://arxiv.org/abs/1606.07947.
    """

    speaker = "teacher"
    needs_teacher = True

    def __init__(
        self,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(Decoding(max_new_tokens, temperature, top_k, top_p), seed)
