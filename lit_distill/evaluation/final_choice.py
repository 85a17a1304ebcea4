r"""The letter that a response to a multiple-choice question gives as its answer.

In this order, and of each kind the last one of the text: a statement (``\boxed{B}``, "answer is B", "B is correct", or a last line
of nothing but B); a marked letter ("(B)", "**B**", "B." at the start of a line); a capital letter that stands alone. The options of
the question, "A. … B. … C. …", are none of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from lit_distill.evaluation.latex import boxes, without_latex

LISTED = 3
"""So many marked letters that follow each other from the first choice on are the options of the question."""
_GOES_WITH_A_LETTER = re.compile(
    "is|was|because|since|as|and|or|but|so|which|that|for|due|if|then|with|from|to|has|would|seems|can|must|states|says|describes|"
    "matches|follows",
    re.IGNORECASE,
)
"""In front of these words a capital A is the name of an option; in front of others, at a sentence's start, it is the article."""


class _Statement(NamedTuple):
    at: int
    letters: frozenset[str]
    """Several if the response does not decide."""


class _Patterns(NamedTuple):
    statement: re.Pattern[str]
    correct: re.Pattern[str]
    marked: re.Pattern[str]
    alone: re.Pattern[str]


@cache
def _patterns(choices: str) -> _Patterns:
    upper = f"[{choices}]"
    either = f"[{choices}{choices.lower()}]"
    more = rf"(?:[\s*]*(?:,|/|&|\bor\b|\band\b)[\s*]*\(?{upper}\b(?!['\u2019]\w|\s+(?:is|was|are|has|can|does|would)\b)\)?)"
    named = rf"(?P<first>{either})(?![\w'\u2019]|-\w|\.\w)\)?(?P<more>{more}*)"
    verb = r"(?:s?\b[^.:=\n]{0,60}?\b(?:is|was|be)\b|[\s*_]{0,4}[:=])"  # "Options:" lists them
    return _Patterns(
        re.compile(
            rf"(?:\b(?i:answer|option|choice){verb}|\b(?i:choose|chose|pick|picked|select|selected|go with)\b)"
            rf"(?:[^\w\n]|_|\n|\b(?i:option|choice|letter|either|the|answer)\b){{0,20}}?(?<!\w){named}"
        ),
        re.compile(
            rf"(?<![\w'\u2019.-])(?P<first>{upper})[)\s*]{{1,4}}(?:is|was)\s+(?:(?:the|clearly|obviously)\s+){{0,2}}"
            r"(?:correct|right|best|true|answer)\b"
        ),
        re.compile(
            rf"(?<!\w)[(\[](?P<round>{upper})[)\]](?!\w)|(?:\*\*|__)\(?(?P<bold>{upper})(?:[).:][^*\n]*)?(?:\*\*|__)"
            rf"|^[ \t>*-]*(?P<line>{upper})[).:](?=\s|\*|$)",
            re.MULTILINE,
        ),
        re.compile(rf"(?<![\w'\u2019.°-])(?<!\w\()(?P<first>{upper})(?![\w'\u2019°+#-]|\.\w|\s*[=+/^<>])"),
    )


def final_choice(text: str, choices: str) -> str | None:
    """The answer of a response or a reference, one of the ``choices``; None if there is none, or the statement names several."""
    innermost = [box for box in boxes(text) if "boxed" not in box[2]]
    for start, end, content in reversed(innermost):
        text = f"{text[:start]} answer: {content} \n{text[end:]}"
    text = without_latex(text)
    if statements := list(_statements(text, choices)):
        _, letters = max(statements, key=lambda statement: statement.at)
        return next(iter(letters)) if len(letters) == 1 else None
    marked = [(found.start(), _letter(found)) for found in _patterns(choices).marked.finditer(text)]
    listed, end = _listed([letter for _, letter in marked], choices), 0
    if listed:
        end = marked[max(listed)][0] + 3
    chosen = [letter for index, (_, letter) in enumerate(marked) if index not in listed]
    alone = [found[0] for found in _patterns(choices).alone.finditer(text, end) if not _is_word(found)]
    return next(reversed(chosen or alone), None)


def _statements(text: str, choices: str) -> Iterator[_Statement]:
    patterns = _patterns(choices)
    for found in patterns.statement.finditer(text):
        if not _is_word(found):
            more = re.findall(rf"\b[{choices}]\b", found["more"])
            yield _Statement(found.start("first"), frozenset([found["first"].upper(), *more]))
    for found in patterns.correct.finditer(text):
        yield _Statement(found.start("first"), frozenset([found["first"]]))
    lines = text.strip().splitlines()
    last = re.sub(r"[\s*_()\[\].:\"'`$]", "", lines[-1]) if lines else ""
    if len(last) == 1 and (last if len(lines) > 1 else last.upper()) in choices:
        yield _Statement(text.rindex(last), frozenset([last.upper()]))


def _letter(found: re.Match[str]) -> str:
    return found["round"] or found["bold"] or found["line"]


def _listed(letters: list[str], choices: str) -> set[int]:
    """The places of letters that list the options of the question."""
    listed: set[int] = set()
    run: list[int] = []
    for index, letter in enumerate([*letters, "end"]):
        if run and letter == choices[len(run) : len(run) + 1]:
            run.append(index)
            continue
        if len(run) >= min(LISTED, len(choices)):
            listed |= set(run)
        run = [index] if letter == choices[0] else []
    return listed


def _is_word(found: re.Match[str]) -> bool:
    """Whether a letter is the English article or pronoun: in front of a word that does not go with the name of an option."""
    start, letter, text = found.start("first"), found["first"], found.string
    follows = re.match(r"\s+([A-Za-z]+)", text[start + 1 : start + 40])
    if letter.upper() not in ("A", "I") or follows is None:
        return False
    if letter == "I":
        return True
    if letter == "A" and (follows[1][0].isupper() or not _begins_sentence(text, start)):
        return False
    return _GOES_WITH_A_LETTER.fullmatch(follows[1]) is None


def _begins_sentence(text: str, at: int) -> bool:
    before = text[max(0, at - 20) : at].rstrip(" \t\"'*_>\u201c(-")
    return at == 0 or not before or before[-1] in ".!?:;\n"
