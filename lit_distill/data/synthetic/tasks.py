"""Synthetic instruction tasks, generated from a seed: no downloads, exact match can be measured, splits never overlap.

Thirteen kinds of task over 20 words: eleven with one right answer (adding, sorting, reversing, counting, questions about a text)
and two open-ended ones of two to four sentences, for which ROUGE-L and the response length are meaningful. A hash of its content
decides the split of an item, so two splits never share an (instruction, input), whatever their seeds and sizes.

The numbers, words and lengths are chosen so that a student of 0.13M parameters solves half of the items, and a teacher of 0.86M
clearly more.

All random choices use ``random.Random(seed).random()``: Python guarantees its sequence to be the same in every version.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
Task = tuple[str, str, str]
"""Instruction, input and output."""

NAMES = ("Tom", "Anna", "Ben", "Eva", "Max", "Lea")
PLACES = ("Rome", "Oslo", "Paris", "Lima", "Cairo", "Bern")
COLOURS = ("red", "blue", "green", "black", "white")
ANIMALS = ("cat", "dog", "fox", "hen", "pig")
FOODS = ("milk", "bread", "rice", "soup", "fish")
THINGS = ("sun", "moon", "lamp", "book", "boat")
WORDS = COLOURS + ANIMALS + FOODS + THINGS
LETTERS = tuple("abcdefghijklmnop")
SPLITS = ("train", "validation", "test")


class Draw:
    """Random choices that only call ``random()``, so they are the same on every platform and Python version."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, n: int) -> int:
        """A random integer from 0 to n - 1."""
        return int(self._random.random() * n)

    def between(self, low: int, high: int) -> int:
        """A random integer from ``low`` to ``high``, both included."""
        return low + self.below(high - low + 1)

    def one(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """``count`` different options in random order."""
        pool = list(options)
        return [pool.pop(self.below(len(pool))) for _ in range(count)]


def _add(draw: Draw) -> Task:
    numbers = [draw.below(10) for _ in range(3)]
    return draw.one(("Add the numbers.", "What is the sum?")), " + ".join(map(str, numbers)), str(sum(numbers))


def _larger(draw: Draw) -> Task:
    a, b = draw.some(range(10, 100), 2)
    return draw.one(("Which number is larger?", "Give the larger number.")), f"{a} {b}", str(max(a, b))


def _sort_numbers(draw: Draw) -> Task:
    numbers = draw.some(range(10), draw.between(3, 5))
    return "Sort the numbers.", " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))


def _sort_words(draw: Draw) -> Task:
    words = draw.some(WORDS, draw.between(2, 4))
    return draw.one(("Sort the words.", "Put the words in order.")), " ".join(words), " ".join(sorted(words))


def _reverse_words(draw: Draw) -> Task:
    words = draw.some(WORDS, draw.between(2, 4))
    return draw.one(("Reverse the words.", "Write the words backwards.")), " ".join(words), " ".join(reversed(words))


def _reverse_letters(draw: Draw) -> Task:
    letters = [draw.one(LETTERS) for _ in range(draw.between(3, 5))]
    return "Reverse the letters.", " ".join(letters), " ".join(reversed(letters))


def _repeat(draw: Draw) -> Task:
    words = draw.some(WORDS, draw.between(2, 4))
    return "Repeat the words.", " ".join(words), " ".join(words)


def _uppercase(draw: Draw) -> Task:
    words = draw.some(WORDS, draw.between(1, 3))
    return draw.one(("Write in capitals.", "Make it uppercase.")), " ".join(words), " ".join(words).upper()


def _pick(draw: Draw) -> Task:
    words = draw.some(WORDS, draw.between(3, 5))
    name, index = draw.one((("first", 0), ("second", 1), ("last", -1)))
    return f"Give the {name} word.", " ".join(words), words[index]


def _count(draw: Draw) -> Task:
    word, other = draw.some(WORDS, 2)
    words = [draw.one((word, word, other, draw.one(WORDS))) for _ in range(draw.between(3, 6))]
    return f"How often does {word} appear?", " ".join(words), str(words.count(word))


def _facts(draw: Draw) -> list[tuple[str, str, str, str, str]]:
    """Name, place, colour, animal and food of two people."""
    parts = (draw.some(options, 2) for options in (NAMES, PLACES, COLOURS, ANIMALS, FOODS))
    return list(zip(*parts, strict=True))


def _answer(draw: Draw) -> Task:
    people = _facts(draw)
    text = " ".join(f"{name} from {place} has a {colour} {animal}." for name, place, colour, animal, _ in people)
    name, place, colour, animal, _ = draw.one(people)
    question, answer = draw.one(
        (
            (f"Where is {name} from?", f"{name} is from {place}."),
            (f"What does {name} have?", f"{name} has a {colour} {animal}."),
            (f"Who has the {animal}?", f"{name} has the {animal}."),
            (f"Which colour is the {animal}?", f"The {animal} is {colour}."),
        )
    )
    return question, text, answer


def _describe(draw: Draw) -> Task:
    """Sentences about given facts: the content is fixed, the wording and its order are free."""
    name, place, colour, animal, food = _facts(draw)[0]
    sentences = [
        draw.one((f"{name} is a {colour} {animal}.", f"There is a {colour} {animal} called {name}.")),
        draw.one((f"{name} lives in {place}.", f"The {animal} lives in {place}.", f"{place} is the home of {name}.")),
        draw.one((f"{name} likes {food}.", f"The {animal} eats {food} every day.")),
    ]
    last = sentences[1:] if draw.below(2) else sentences[:0:-1]
    return "Describe the animal.", f"{name}, {colour} {animal}, {place}, {food}", " ".join(sentences[:1] + last)


def _story(draw: Draw) -> Task:
    """Two to four sentences: a beginning, events in any number and order, an end."""
    name, place, colour, animal, food = _facts(draw)[0]
    thing, friend = draw.one(THINGS), draw.one(ANIMALS)
    begin = draw.one((f"Once a {animal} lived in {place}.", f"{name} was a {colour} {animal}."))
    events = (
        f"{name} found a {thing}.",
        f"{name} met a {friend}.",
        f"The {animal} was looking for {food}.",
        f"They went to the {thing}.",
        f"The {friend} had some {food}.",
    )
    end = draw.one(("They were happy.", f"{name} went home.", f"Then {name} slept."))
    sentences = [begin, *draw.some(events, draw.between(0, 2)), end]
    return "Write a story.", f"{name}, {colour} {animal}, {place}", " ".join(sentences)


KINDS: dict[str, Callable[[Draw], Task]] = {
    "add": _add,
    "larger": _larger,
    "sort-numbers": _sort_numbers,
    "sort-words": _sort_words,
    "reverse-words": _reverse_words,
    "reverse-letters": _reverse_letters,
    "repeat": _repeat,
    "uppercase": _uppercase,
    "pick": _pick,
    "count": _count,
    "answer": _answer,
    "describe": _describe,
    "story": _story,
}


def split_of(kind: str, text: str) -> str:
    """The split of an input, decided by a hash of its content: a tenth is validation, a tenth test, the rest training."""
    digest = hashlib.sha256(f"{kind}\n{text}".encode()).digest()
    return {0: "test", 1: "validation"}.get(int.from_bytes(digest[:4], "big") % 10, "train")


def generate_instructions(
    seed: int, count: int, split: str = "train", kinds: Sequence[str] = tuple(KINDS)
) -> list[dict[str, str]]:
    """``count`` different items of a split; the kind of each item is drawn uniformly.

    Args:
        seed: seed of the random choices. Items of two splits differ for any two seeds.
        count: number of items. A larger count returns these items first, then more.
        split: ``train``, ``validation`` or ``test``.
        kinds: names from `KINDS`.

    Returns:
        Records with ``id`` (split, kind and number), ``instruction``, ``input`` and ``output``.

    Raises:
        ValueError: if the split or a kind is unknown, or if the kinds have fewer than ``count`` different items.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: choose one of {', '.join(SPLITS)}.")
    if not kinds or (unknown := [kind for kind in kinds if kind not in KINDS]):
        given = f"kinds holds {unknown}" if kinds else "kinds is empty"
        raise ValueError(f"{given}: choose from {', '.join(KINDS)}.")
    draw = Draw(seed)
    records: list[dict[str, str]] = []
    seen: set[tuple[str, str]] = set()
    failures = 0
    while len(records) < count:
        kind = draw.one(kinds)
        instruction, text, output = KINDS[kind](draw)
        if split_of(kind, text) != split or (instruction, text) in seen:
            failures += 1
            if failures > 1000:
                raise ValueError(
                    f"kinds {list(kinds)} have only about {len(records)} different items for {split}, not {count}: "
                    "ask for fewer items or add kinds."
                )
            continue
        failures = 0
        seen.add((instruction, text))
        number = f"{split}-{kind}-{len(records):06d}"
        records.append({"id": number, "instruction": instruction, "input": text, "output": output})
    return records


def splits(seed: int, train: int, validation: int, test: int) -> dict[str, list[dict[str, str]]]:
    """The three splits with the given sizes; no (instruction, input) is in two of them."""
    counts = dict(zip(SPLITS, (train, validation, test), strict=True))
    return {split: generate_instructions(seed, count, split) for split, count in counts.items()}


def generate_corpus(seed: int, count: int) -> list[str]:
    """``count`` paragraphs of plain text made from tasks of the train split, for a pre-training loss."""
    draw = Draw(seed)
    paragraphs: list[str] = []
    while len(paragraphs) < count:
        kind = draw.one(("story", "describe", "answer"))
        _, text, output = KINDS[kind](draw)
        if split_of(kind, text) == "train":
            paragraphs.append(f"{text} {output}" if kind == "answer" else output)
    return paragraphs
