"""DPKD's source: pairs of a response to learn and one of the student's own to unlearn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_distill.models import label_logprobs
from lit_distill.objectives import PAIR_SIGNALS, TEACHER_OF_PAIRS, Objective
from lit_distill.rollouts.decoding import Decoding, run_seed
from lit_distill.rollouts.phases import KEY, check_phase, check_sizes, mini_batches
from lit_distill.rollouts.sources import DatasetResponses, Players, Source
from lit_distill.rollouts.speaking import answers, prompts_of
from lit_distill.types import Pairs, Sequences

if TYPE_CHECKING:
    from lit_distill.models import CausalLM, FrozenTeacher
    from lit_distill.types import Batch


class ResponsePairs(Source):
    """The chosen text is the dataset's or the teacher's, the rejected one is the student's, written when the batch comes.

    Objectives on tokens, such as `NextToken`, see the chosen text. A batch of ``data.init_args.batch_size`` prompts is a phase:
    the student's texts are written anew every ``batch_size / mini_batch_size * inner_epochs`` optimiser steps; with a batch as
    large as the training data, that is once an epoch (``decode_batch_size`` then bounds the memory). Texts of the teacher
    that `predict` wrote to a file are a dataset. Nothing is differentiated through sampling, and every random number is a
    function of ``seed``, the optimiser step and the item.

    Args:
        chosen: dataset, or teacher, who then answers live.
        mini_batch_size: pairs of one optimiser step, over all ranks; by default the whole batch.
        inner_epochs: how often each pair is learnt from. With more than one, the teacher scores a pair once for all of them.
        shuffle: mix the pairs anew for each inner epoch; each rank its own, so that another number of ranks makes other
            mini-batches.
        max_new_tokens: longest response, of both speakers.
        temperature: of both speakers; 0 takes the most probable token.
        top_k: draw from the k most probable tokens only; 0 draws from all.
        top_p: draw from the smallest set of tokens with this much probability.
        decode_batch_size: responses decoded at a time on each rank; all at once by default.
        seed: of all draws; by default ``seed_everything``.

    Source: DPKD, https://arxiv.org/abs/2406.19774.
    """

    provides = DatasetResponses.provides | (PAIR_SIGNALS.keys() - TEACHER_OF_PAIRS)
    provides_with_teacher = Source.provides_with_teacher | TEACHER_OF_PAIRS

    def __init__(
        self,
        chosen: Literal["dataset", "teacher"] = "dataset",
        mini_batch_size: int | None = None,
        inner_epochs: int = 1,
        shuffle: bool = True,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        decode_batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        check_sizes(mini_batch_size=mini_batch_size, inner_epochs=inner_epochs, decode_batch_size=decode_batch_size)
        self.chosen = chosen
        self.needs_teacher = chosen == "teacher"
        self.mini_batch_size = mini_batch_size
        self.inner_epochs = inner_epochs
        self.shuffle = shuffle
        self.decoding = Decoding(max_new_tokens, temperature, top_k, top_p)
        self.decode_batch_size = decode_batch_size
        self.seed = run_seed(seed)
        self._teacher_scores = False

    def check(self, objectives: Mapping[str, Objective]) -> None:
        """Refuse a method without an objective on pairs; note whether one asks the teacher."""
        if not any(objective.on_pairs for objective in objectives.values()):
            raise ValueError(
                "model.source: ResponsePairs lets the student write texts that none of model.objectives looks at. "
                "Add one on pairs, such as `dpkd: DirectPreference`, or set source: DatasetResponses or TeacherRollouts."
            )
        self._teacher_scores = any(objective.needs & TEACHER_OF_PAIRS for objective in objectives.values())

    def check_trainer(self, trainer: Any) -> None:
        """Refuse mini-batches that are larger than the phase, and a choice of responses that the data do not have."""
        check_phase(self.mini_batch_size, trainer)
        if self.chosen == "dataset" and not getattr(trainer.datamodule, "responses", True):
            raise ValueError(
                f"{KEY}.chosen: the data has no responses to choose. Set data.init_args.responses: true, or chosen: teacher."
            )

    def steps_per_batch(self, batch_size: int) -> int:
        """Inner epochs times mini-batches."""
        return self.inner_epochs * -(-batch_size // (self.mini_batch_size or batch_size))

    def mini_batches(self, batch: Batch, players: Players) -> Iterator[Pairs]:
        """Let the student answer, and the teacher where it is to be learnt from, and go over the pairs ``inner_epochs`` times."""
        rejected = self._answers(players.student, batch, players, "rejected")
        if self.chosen == "teacher":
            assert players.teacher is not None
            pairs = Pairs(self._answers(players.teacher, batch, players, "chosen"), rejected)
        elif batch.sequences is None:
            raise ValueError(
                f"{KEY}.chosen: the data has no responses to choose. Set data.init_args.responses: true, or chosen: teacher."
            )
        else:
            pairs = Pairs(batch.sequences, rejected)
        if self.inner_epochs > 1 and self._teacher_scores:
            pairs = self._scored(pairs, players.teacher)
        size = self.mini_batch_size or len(pairs) * players.world_size
        key = (self.seed, players.step) if self.shuffle else None
        yield from mini_batches(pairs, size, self.inner_epochs, players.world_size, key)

    def _answers(
        self, speaker: CausalLM | FrozenTeacher, batch: Batch, players: Players, role: Literal["chosen", "rejected"]
    ) -> Sequences:
        prompts, phase = prompts_of(batch, self), f"{players.step}/{role}"  # each draws numbers of its own
        draws = (self.seed, phase)
        trajectories = answers(speaker, batch, prompts, players, self.decoding, draws, self.decode_batch_size)
        if role == "rejected":  # the callbacks are shown what the student says
            players.show(trajectories)
        return trajectories.sequences()

    def _scored(self, pairs: Pairs, teacher: FrozenTeacher | None) -> Pairs:
        """The pairs with the teacher's log-probability of every token; chosen and rejected texts share its forwards."""
        assert teacher is not None
        text, width = pairs.both(), pairs.chosen.input_ids.shape[1]
        scores = torch.zeros(text.input_ids.shape, device=text.input_ids.device)
        size = 2 * (self.decode_batch_size or len(pairs))
        for first in range(0, len(text), size):
            part = slice(first, first + size)
            here = Sequences(text.input_ids[part], text.attention_mask[part], text.target_mask[part])
            labels = here.input_ids[here.target_mask]
            rows = teacher.target_rows(here)  # before the head: they take the teacher to the device of the texts
            said = label_logprobs(teacher.head(), rows, labels)
            scores[part] = scores[part].masked_scatter(here.target_mask, said)
        chosen, rejected = scores[: len(pairs), :width], scores[len(pairs) :, : pairs.rejected.input_ids.shape[1]]
        return Pairs(
            replace(pairs.chosen, signals={"teacher_logprobs": chosen}),
            replace(pairs.rejected, signals={"teacher_logprobs": rejected}),
        )
