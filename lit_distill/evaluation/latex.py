r"""LaTeX in answers: what stands in ``\boxed{...}``, and text without the commands around numbers and letters."""

from __future__ import annotations

import re

_BRACES = re.compile(r"\\[{}]|\\f?boxed\s*\{|[{}]")
_FORMATTING = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|operatorname|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|(\d)\s*(\d))")
_SPACE_IN_NUMBER = re.compile(r"(?<=\d)(?:\\[,;: ]|\{,\}|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_SPACE = re.compile(r"\\[,;: ]|\\q?quad(?![a-zA-Z])|~|[\u00a0\u2009\u202f]")
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})")
_LEFT_OUT = re.compile(r"\\!|\\(?:left|right|displaystyle)(?![a-zA-Z])")


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Start, end and content of every closed ``\boxed{...}``, in order of their ends; braces inside are matched.

    A box that is cut off is none.
    """
    found: list[tuple[int, int, str]] = []
    opened: list[tuple[int, int, bool]] = []
    for brace in _BRACES.finditer(text):
        if brace[0] == "}" and opened:
            start, inside, is_box = opened.pop()
            if is_box:
                found.append((start, brace.end(), text[inside : brace.start()]))
        elif brace[0].endswith("{") and brace[0] != r"\{":
            opened.append((brace.start(), brace.end(), len(brace[0]) > 1))
    return found


def without_latex(text: str) -> str:
    r"""A text with ``a/b`` for fractions, and without commands for fonts and spaces, ``\$``, ``\%`` and ``{,}``.

    ``3\frac{1}{2}`` becomes ``3 1/2``.
    """
    text = _LEFT_OUT.sub("", _DEGREES.sub("", text))
    text = _SPACE.sub(" ", _SPACE_IN_NUMBER.sub(",", text))
    while (plain := _FORMATTING.sub(r"\1", text)) != text:  # they may be nested
        text = plain
    text = _FRACTION.sub(_as_quotient, text)
    return re.sub(r"\\([$%&#])", r"\1", text)


def _as_quotient(fraction: re.Match[str]) -> str:
    above, below = (given.strip() for given in fraction.groups() if given is not None)
    follows_digit = fraction.string[fraction.start() - 1 : fraction.start()].isdigit()
    return f"{' ' if follows_digit else ''}{above}/{below}"
