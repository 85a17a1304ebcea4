"""Checkers: is a response correct? Subclass `Checker` and name the class in YAML by its ``class_path``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeVar

from lit_distill.evaluation.final_choice import final_choice
from lit_distill.evaluation.final_number import Number, final_number
from lit_distill.evaluation.ngrams import exact_match
from lit_distill.types import arguments_of, every_error_of

Answer = TypeVar("Answer")


class Checker(ABC):
    """Scores a response against the accepted ones. The arguments of a subclass are its YAML."""

    @abstractmethod
    def __call__(self, response: str, references: Sequence[str]) -> float:
        """The score of a response in [0, 1]; 1 is correct.

        Args:
            response: the generated text, without special tokens.
            references: the accepted texts, at least one.

        Raises:
            ValueError: if a reference cannot be read; the message begins with the name of the class.
        """

    def check(self, references: Sequence[str]) -> None:  # noqa: B027 - most checkers read any text
        """Called for every item before a run begins, so that a reference that cannot be read does not end it later.

        Args:
            references: the accepted texts, at least one.

        Raises:
            ValueError: if one cannot be read; the message begins with the name of the class.
        """


class ExactMatch(Checker):
    """Correct if the text is one of the references, apart from case, ASCII punctuation and extra white space; see `exact_match`."""

    def __call__(self, response: str, references: Sequence[str]) -> float:
        """See `Checker`."""
        return float(exact_match(response, references))


class NumberMatch(Checker):
    r"""Correct if the final answer is the number of a reference, however it is written: 1,250 = 1250.0 = $1250 = 1.25e3 = 2500/2.

    The answer is the last ``\boxed{...}``; else what follows ``####``; else what follows the last "answer is" or "answer:"; else
    the last number; see `final_number`. The same holds for references, which may be whole solutions. A response without a number,
    or with another term such as 2π, is wrong. If one of the two has a percent sign, 50% is both 50 and 0.5. Numbers are compared
    as fractions, without rounding.

    Args:
        tolerance: accepted difference, as a share of the reference; for references between -1 and 1 the difference itself.
    """

    def __init__(self, tolerance: float = 0.0) -> None:
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance: expected a finite number, at least 0, got {tolerance}.")
        self.tolerance = Fraction(str(tolerance))  # 0.1 is a tenth, although no float is

    def __call__(self, response: str, references: Sequence[str]) -> float:
        """See `Checker`."""
        answer = final_number(response)
        return float(any(answer is not None and self._equal(answer, number) for number in self._numbers(references)))

    def check(self, references: Sequence[str]) -> None:
        """See `Checker`."""
        self._numbers(references)

    def _numbers(self, references: Sequence[str]) -> list[Number]:
        return _read(self, references, final_number, "has no number at its end, or one that is only a part of a term")

    def _equal(self, answer: Number, wanted: Number) -> bool:
        differ = answer.percent != wanted.percent
        targets = [wanted.value / 100, wanted.value] if differ and wanted.percent else [wanted.value]
        values = [answer.value / 100, answer.value] if differ and answer.percent else [answer.value]
        return any(abs(a - b) <= self.tolerance * max(Fraction(1), abs(b)) for a in values for b in targets)


class ChoiceMatch(Checker):
    r"""Correct if the response chooses the letter of a reference, as in "(B)", "B.", "**B**", "the answer is B" or ``\boxed{B}``.

    A statement such as "the answer is B" counts more than a letter alone, and a later one more than an earlier one; see
    `final_choice`. A response that states several letters, or none, is wrong.

    Args:
        choices: the letters of the options.
    """

    def __init__(self, choices: str = "ABCDE") -> None:
        self.choices = choices.upper()
        if not (self.choices.isascii() and self.choices.isalpha()) or len(set(self.choices)) < max(2, len(choices)):
            raise ValueError(f"choices: expected two or more different letters, such as ABCD, got {choices!r}.")

    def __call__(self, response: str, references: Sequence[str]) -> float:
        """See `Checker`."""
        return float(self._choice(response) in self._choices(references))

    def check(self, references: Sequence[str]) -> None:
        """See `Checker`."""
        self._choices(references)

    def _choices(self, references: Sequence[str]) -> list[str]:
        return _read(self, references, self._choice, f"chooses none of the letters {self.choices}")

    def _choice(self, text: str) -> str | None:
        return final_choice(text, self.choices)


def check_item(checker: Checker, references: Sequence[str], item: str) -> None:
    """Refuse references of an item that the checker cannot read.

    Raises:
        ArgumentError: of the checker, naming the item.
    """
    with every_error_of(checker, _of_item(item)):
        checker.check(references)


def score_of(checker: Checker, response: str, references: Sequence[str], item: str | None = None) -> float:
    """The score of a response, in [0, 1].

    Args:
        checker: scores it.
        response: the text.
        references: the accepted texts.
        item: id of the item, for messages.

    Raises:
        ArgumentError: of the checker, if it cannot read a reference, or its score is not a number in [0, 1].
    """
    of_item = "" if item is None else _of_item(item)
    with arguments_of(checker):
        try:
            returned: object = checker(response, references)
        except ValueError as error:
            raise ValueError(f"{error}{of_item}") from error
        if not isinstance(returned, int | float) or not 0 <= returned <= 1:
            raise ValueError(
                f"{type(checker).__name__} must return a score in [0, 1], but returned {returned!r} for {response!r} with the "
                f"references {list(references)}.{of_item}"
            )
    return float(returned)


def _of_item(item: str) -> str:
    return f" This is the item {item!r}: correct or remove it, or choose another checker."


def _read(
    checker: Checker, references: Sequence[str], read: Callable[[str], Answer | None], problem: str
) -> list[Answer]:
    """The answers of all references.

    Raises:
        ValueError: naming the first reference without one.
    """
    answers = []
    for reference in references:
        answer = read(reference)
        if answer is None:
            raise ValueError(f"{type(checker).__name__}: the reference {reference!r} {problem}.")
        answers.append(answer)
    return answers
