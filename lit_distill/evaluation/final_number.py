r"""The number that a response gives as its final answer, as an exact fraction.

Where it is looked for: the last ``\boxed{...}``; else the last ``####`` with a number right behind it, as in GSM8K; else behind the
last "answer is" or "answer:"; else the last number of the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from lit_distill.evaluation.latex import boxes, without_latex

MOST_DIGITS, LARGEST_EXPONENT = 100, 300
"""A number beyond is none: a model that repeats itself writes thousands of digits."""

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_CURRENCY = r"(?:US\$|USD|EUR|GBP|Rs\.?|[$€£¥₹])[ ]?"
_NUMBER = re.compile(
    rf"""
    (?:(?<![\w)\]}}%])(?P<sign>[-+]))?                                # neither a subtraction nor the dash of a range
    (?<![A-Za-z_0-9]) (?:{_CURRENCY})? (?P<sign_inside>[-+](?=[0-9.]))?
    (?P<mantissa>{_INTEGER}(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)
    (?:[eE](?P<exponent>[-+]?[0-9]+)(?![A-Za-z0-9])
      |[ ]?(?:[x\u00d7*·]|\\times|\\cdot)[ ]?10[ ]?\^[ ]?\{{?(?P<times_ten>[-+]?[0-9]+)\}}?)?
    (?:[ ]?\^[ ]?\{{?(?P<power>[-+]?[0-9]+)\}}?)?
    (?:[ ]?/[ ]?(?P<below>{_INTEGER}(?:\.[0-9]+)?)
      |[ ](?P<above>[0-9]+)[ ]?/[ ]?(?P<under>[0-9]+))?
    (?P<percent>[ ]?(?:%|per[ ]?cent\b))?
    (?P<spoiled>[ ]?(?:\\pi|\\sqrt|π|√|\^|/[ ]?[0-9]))?               # 2π, 2√3, 2^n, a date
    """,
    re.VERBOSE,
)
_SPOILED = ("√", "√(", "sqrt{", "sqrt(", "sqrt ", "/", "}{")
"""Behind these, a number is a part of something else."""
_VARIABLE_BEHIND = re.compile(r"[ ]?[-+*/^·\u00d7][ ]?[A-Za-z](?![A-Za-z])")
_SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_HASHES = re.compile(r"####(?!#)[ \t]*(.*)")
_HEADING = re.compile(r"\s?[.):]\s*\S")
_STATEMENT = re.compile(
    r"\banswers?\b(?:[^.:=\n]{0,60}?\b(?:is|was|equals)\b|[\s*_]{0,4}(?P<colon>[:=]))", re.IGNORECASE
)
_CALCULATION = re.compile(  # between two of its numbers, with the sign of the second; the first may have a unit
    r"[\s*_(){}$€£\\]*(?:[A-Za-z%]+\s*)??(?P<operator>[-+*/\u00d7÷·x=]|\\times|\\div|\\cdot)[\s(){}$€£]*[-+]?"
)


class Number(NamedTuple):
    """A number with how it was written."""

    value: Fraction
    """Without the percent sign: 50 for 50%."""
    percent: bool = False


def final_number(text: str) -> Number | None:
    """The final answer of a response or a reference; None if it names no number, or one that is only a part of a term."""
    if found := boxes(text):
        return _only_number(_plain(found[-1][2]))
    text = _plain(text)
    marked = [number for line in _HASHES.findall(text) for number in _right_behind_hashes(line)]
    if marked:
        return marked[-1]
    if statements := list(_STATEMENT.finditer(text)):
        return _stated(text[statements[-1].end() :], is_heading=statements[-1]["colon"] is not None)
    numbers = _numbers(text)
    return _value(numbers[-1]) if numbers else None


def _plain(text: str) -> str:
    """Without LaTeX, with ``^3`` for a superscript and the hyphen for every minus sign."""
    text = without_latex(text).replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")
    return re.sub("(?<=[0-9])[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda found: f"^{found[0].translate(_SUPERSCRIPTS)}", text)


def _numbers(text: str) -> list[re.Match[str]]:
    return list(_NUMBER.finditer(text))


def _only_number(content: str) -> Number | None:
    """The number in a box, behind an equals sign if there is one; None if there are several, or it is a part of a term."""
    sides = [numbers for side in content.split("=") if (numbers := _numbers(side))]
    if not sides or len(sides[-1]) > 1 or _is_in_term(sides[-1][0]):
        return None
    return _value(sides[-1][0])


def _is_in_term(number: re.Match[str]) -> bool:
    """Whether a variable is added to the number or multiplied by it: x + 1, 3 - y."""
    before, after = number.string[: number.start()], number.string[number.end() :]
    return re.search(r"[\w)}][ ]?[-+*/^·\u00d7][ ]?$", before) is not None or _VARIABLE_BEHIND.match(after) is not None


def _right_behind_hashes(line: str) -> list[Number | None]:
    """The number at the beginning of a line; none if the line is a heading, such as ``#### 2. Conclusion``."""
    numbers = _numbers(line)
    if not numbers or re.search(r"\w", line[: numbers[0].start()]) or _HEADING.match(line, numbers[0].end()):
        return []
    return [_result(numbers)]


def _stated(text: str, is_heading: bool) -> Number | None:
    """The number of an answer, from the text behind "answer is" or "answer:"; the latter may be the heading of a calculation."""
    numbers = _numbers(text)
    if not numbers:
        return None
    if not re.search(r"[A-Za-z]", text[: numbers[0].start()]):
        return _result(numbers)
    end = text.find("\n\n", len(text) - len(text.lstrip()))  # of the paragraph
    inside = numbers if end < 0 else [number for number in numbers if number.start() < end]
    if is_heading:
        return _value((inside or numbers)[-1])
    return _result(inside) if inside else None


def _result(numbers: Sequence[re.Match[str]]) -> Number | None:
    """The first of the numbers or, if it begins a calculation such as ``12 + 3 = 15``, the result."""
    result, calculates = numbers[0], False
    for left, right in pairwise(numbers):
        signed = right[0].startswith(("-", "+"))
        between = _CALCULATION.fullmatch(left.string, left.end(), right.start() + signed)
        if between is None:
            break
        if between["operator"] != "=":
            calculates = True
        elif calculates:
            result, calculates = right, False
    return _value(result)


def _value(found: re.Match[str]) -> Number | None:
    """None if the number is a part of something else, such as 2π, or too large."""
    if found["spoiled"] or found.string.endswith(_SPOILED, 0, found.start()) or len(found[0]) > MOST_DIGITS:
        return None
    value = Fraction(found["mantissa"].replace(",", ""))
    for base, exponent in ((10, found["exponent"] or found["times_ten"]), (None, found["power"])):
        if exponent is None:
            continue
        if abs(int(exponent)) > LARGEST_EXPONENT or (base is None and value == 0):
            return None
        value = value * Fraction(base) ** int(exponent) if base else value ** int(exponent)
    below = Fraction((found["below"] or found["under"] or "1").replace(",", ""))
    if below == 0:
        return None
    if found["above"] is None:
        value /= below
    else:  # 3 1/2; but behind a year or a label, as in "in 2020 3/2", the fraction stands alone
        value = int(found["above"]) / below + (value if int(found["above"]) < below else 0)
    negative = "-" in ((found["sign"] or "") + (found["sign_inside"] or ""))
    return Number(-value if negative else value, found["percent"] is not None)
