"""Rewards of the user's own for whole responses, beside the teacher's reward of every token."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lit_distill.types import ArgumentError

if TYPE_CHECKING:
    from lit_distill.types import Batch, Responses


class Answer(NamedTuple):
    """A response, and what is known of the item that it answers."""

    id: str
    """Of the item."""
    prompt: str
    """As the student reads it."""
    response: str
    """Without special tokens."""
    references: tuple[str, ...]
    """The accepted responses; empty if the data has none."""
    fields: Mapping[str, str]
    """Those fields of the record that `Reward.fields` asks for."""
    finished: bool
    """Whether it ended before ``max_new_tokens``."""


class Reward(ABC):
    """Scores whole responses, for `TeacherMixedRollouts`. Subclass it and name the class in YAML by its ``class_path``.

    Args:
        weight: factor of the score in the reward, in nats for each unit of the score; a finite number.

    Raises:
        ValueError: if the weight is not finite.
    """

    fields: frozenset[str] = frozenset()
    """Fields of the records that it needs; the data module adds them to the items."""

    def __init__(self, weight: float = 1.0) -> None:
        if not math.isfinite(weight):
            raise ValueError(f"weight: expected a finite number for {type(self).__name__}, got {weight}.")
        self.weight = weight

    @abstractmethod
    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        """One finite score for each response; called on every rank with its own responses, which may be none."""

    def check(self, item: str, references: Sequence[str]) -> None:  # noqa: B027 - most rewards read no references
        """Called for every training item before a run begins, so that one that cannot be scored does not end it later.

        Args:
            item: its id.
            references: the accepted responses; empty if the data has none.

        Raises:
            ValueError: naming the item.
        """


def scores_of(
    rewards: Mapping[str, Reward], batch: Batch, responses: Responses, texts: Sequence[str], finished: Sequence[bool]
) -> dict[str, Tensor]:
    """The score of every response, ``[B]`` float32 each on the device of the responses, by the name of the reward.

    Args:
        rewards: by name.
        batch: the items, in the order of the responses. A rank without items has one dummy response, which scores 0.
        responses: to the prompts of the batch.
        texts: the responses as strings.
        finished: which of them ended by themselves.

    Raises:
        ArgumentError: naming the item, if a reward does not return one finite number for each response.
    """
    answers = [
        Answer(item.id, prompt, text, accepted, item.fields, ended)
        for item, prompt, text, accepted, ended in zip(
            batch.items, batch.prompt_texts, texts, batch.accepted, finished, strict=False
        )
    ]
    found = {}
    for name, reward in rewards.items():
        returned: object = reward(answers)
        try:
            scores = [float(score) for score in returned]  # type: ignore[attr-defined]
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                reward,
                f"{name} must return a list of one number for each response, but returned {returned!r} ({error}).",
            ) from error
        if len(scores) != len(answers):
            raise ArgumentError(
                reward,
                f"{name} must return one number for each of the {len(answers)} responses, but returned {len(scores)}.",
            )
        for answer, score in zip(answers, scores, strict=True):
            if not math.isfinite(score):
                raise ArgumentError(
                    reward,
                    f"{name} returned {score} for the response to the item {answer.id!r}. Return a finite number for every text.",
                )
        padding = len(responses.mask) - len(scores)
        found[name] = torch.tensor([*scores, *[0.0] * padding], device=responses.mask.device)
    return found
