"""Whose text: a source turns the batch of a data module into the mini-batches that are learnt from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lit_distill.objectives import check_needs

if TYPE_CHECKING:
    from torch import Tensor

    from lit_distill.models import CausalLM, FrozenTeacher
    from lit_distill.objectives import Objective
    from lit_distill.rollouts.trajectories import Trajectories
    from lit_distill.types import Batch, Pairs, Sequences


@dataclass(frozen=True)
class Players:
    """Whom a source may let speak, and when."""

    student: CausalLM
    teacher: FrozenTeacher | None
    stop_ids: tuple[int, ...]
    """The tokens that end a response."""
    step: int
    """Optimiser steps done so far: together with a seed it fixes every random number of a phase."""
    total_steps: Callable[[], int]
    """Optimiser steps of the whole run; to be asked only by who needs them, since a run may be bounded by time alone."""
    rank: int
    """Which of the ranks this is: rank r of W has the items r, r + W, … of every batch."""
    world_size: int
    """How many ranks share the data; sizes in the YAML are over all of them."""
    sum_over_ranks: Callable[[Tensor], Tensor]
    """Adds up a tensor of sums over all ranks."""
    show: Callable[[Trajectories], None]
    """Whom to show what was rolled out: the Trainer's callbacks."""


def share_out(corpus: Sequences | None, steps: int) -> Iterator[Sequences]:
    """The corpus rows of a batch, shared out evenly among its optimiser steps.

    Raises:
        ValueError: if there is no corpus, or not one row a step.
    """
    if corpus is None:
        raise ValueError(
            "model.corpus_objectives: there is no corpus. Set data.init_args.corpus, which for your own text takes a path."
        )
    if len(corpus) < steps:
        raise ValueError(
            f"data.init_args.corpus.batch_size: {len(corpus)} rows on each rank for the {steps} optimiser steps that a batch "
            "is good for. Give at least one row a step and rank."
        )
    bounds = [len(corpus) * step // steps for step in range(steps + 1)]
    yield from (corpus.rows(first, last) for first, last in pairwise(bounds))


def check_signals(
    source: Source,
    objectives: Mapping[str, Objective],
    corpus_objectives: Mapping[str, Objective],
    has_teacher: bool,
) -> None:
    """Compare what objectives need with what source, corpus and teacher give; nothing is loaded yet.

    Raises:
        ValueError: naming the key, what is missing and what to do.
    """
    teachers = frozenset({"teacher_logits"} if has_teacher else ())
    given = source.provides | (source.provides_with_teacher if has_teacher else frozenset())
    name = f"the source {type(source).__name__}"
    check_needs(objectives, given, "model.objectives", name)
    source.check(objectives)
    if source.needs_teacher and not has_teacher:
        raise ValueError(f"model.source: in {name} the teacher speaks, and there is none. Set model.teacher.path.")
    text_only = DatasetResponses.provides | teachers
    check_needs(corpus_objectives, text_only, "model.corpus_objectives", "a plain-text corpus")


class Source(ABC):
    """Whose text the objectives see, and how often it is used."""

    provides: frozenset[str]
    """The signals its text carries."""
    provides_with_teacher: frozenset[str] = frozenset({"teacher_logits"})
    """The signals that a teacher adds to them, where there is one."""
    needs_teacher = False
    """Whether the teacher speaks or scores."""

    @abstractmethod
    def mini_batches(self, batch: Batch, players: Players) -> Iterator[Sequences | Pairs]:
        """The texts of each optimiser step that ``batch`` is good for.

        Raises:
            ValueError: if the batch lacks what the source needs.
        """

    def steps_per_batch(self, batch_size: int) -> int:
        """How many optimiser steps a batch of ``batch_size`` items over all ranks is good for."""
        return 1

    def check(self, objectives: Mapping[str, Objective]) -> None:  # noqa: B027 - most sources have nothing to say
        """Refuse objectives whose settings contradict the source's, before anything loads.

        Raises:
            ValueError: naming both keys.
        """

    def check_trainer(self, trainer: Any) -> None:  # noqa: B027
        """Refuse a Trainer that is about to fit and lacks what the source needs, before anything loads.

        Raises:
            ValueError: naming the key.
        """

    def observe_validation(self, figures: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Look at the held-out figures of a validation while fitting, equal on all ranks; ``loss`` is that of the objectives.

        Raises:
            ValueError: if one that the source needs is not there.
        """

    def figures(self) -> dict[str, float]:
        """What to log under ``rollout/`` at an optimiser step, equal on all ranks."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know, equal on all ranks: tensors, numbers, and lists and dictionaries of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from what `state_dict` gave; ``state`` is empty if the checkpoint is that of another source."""


_NO_RESPONSES = (
    "model.source: DatasetResponses learns from the responses in the data, and there are none. "
    "Set data.init_args.responses: true, or choose a source that generates."
)


class DatasetResponses(Source):
    """The responses of the dataset, each used once: SFT, KD, and SeqKD from a file that `predict` wrote."""

    provides = frozenset({"student_logits", "labels"})

    def check_trainer(self, trainer: Any) -> None:
        """Refuse data without responses."""
        if not getattr(trainer.datamodule, "responses", True):
            raise ValueError(_NO_RESPONSES)

    def mini_batches(self, batch: Batch, players: Players) -> Iterator[Sequences]:
        """The batch itself."""
        if batch.sequences is None:
            raise ValueError(_NO_RESPONSES)
        yield batch.sequences
