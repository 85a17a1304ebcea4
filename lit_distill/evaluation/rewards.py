"""Rewards made of checkers: a verifier beside the teacher."""

from __future__ import annotations

from collections.abc import Sequence

from lit_distill.evaluation.checkers import Checker, check_item, score_of
from lit_distill.sources import Answer, Reward
from lit_distill.types import ArgumentError


class CheckerReward(Reward):
    """The score of a checker against the references of the training items: 1 for a correct response.

    Args:
        checker: reads a response and the references, such as `NumberMatch`.
        weight: nats for a correct response.
    """

    def __init__(self, checker: Checker, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.checker = checker

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """The score of every response.

        Raises:
            ArgumentError: naming the item, if it has no reference.
        """
        for answer in answers:
            if not answer.references:
                raise self._no_reference(answer.id)
        return [score_of(self.checker, answer.response, answer.references, answer.id) for answer in answers]

    def check(self, item: str, references: Sequence[str]) -> None:
        """See `Reward`; every item must have a reference that the checker can read."""
        if not references:
            raise self._no_reference(item)
        check_item(self.checker, references, item)

    def _no_reference(self, item: str) -> ArgumentError:
        return ArgumentError(
            self,
            f"checker: the item {item!r} has no reference to check the response against. Give data with responses or references, "
            "or a reward that needs none.",
        )
