"""From fields to the prompt's text: Alpaca's words, the tokenizer's chat template, or the user's own string."""

from __future__ import annotations

from collections.abc import Callable, Collection
from string import Formatter
from typing import Any

KEY = "data.init_args.template"

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class Template:
    r"""How a prompt is written.

    Args:
        text: "alpaca", "chat", or a string with the names of fields in braces, such as ``"Q: {question}\nA:"``.
            ``{{`` is a brace. Only names are filled in: no attributes, indices or formats.

    Raises:
        ValueError: if the string names no field or is not of this form.

    Source: the Alpaca prompt as MiniLLM uses it, https://arxiv.org/abs/2306.08543; its short form for an empty input.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.is_chat = text == "chat"
        # a chat template needs the same fields as Alpaca's short form; its text comes from the tokenizer
        self._plain = _parse(ALPACA if text in {"alpaca", "chat"} else text)
        self._with_input = _parse(ALPACA_WITH_INPUT) if text == "alpaca" else self._plain
        self.variables = tuple(dict.fromkeys(name for _, name in self._plain if name is not None))

    def check(self, known: Collection[str]) -> None:
        """Every variable is a field.

        Raises:
            ValueError: naming the key, the variable and the fields there are.
        """
        for name in self.variables:
            if name not in known:
                raise ValueError(
                    f"{KEY}: {self.text!r} needs the field {name!r}, which the data have not. "
                    f"The fields are {', '.join(known)}. Name one of these, or map it by data.init_args.fields."
                )

    def render(self, field: Callable[[str], str], tokenizer: Any) -> str:
        """The prompt's text.

        Args:
            field: the text of a field, by its name.
            tokenizer: whose chat template is used, if the template is "chat".
        """
        if self.is_chat:
            parts = [field("instruction"), field("input")]
            message = {"role": "user", "content": "\n\n".join(part for part in parts if part)}
            return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        with_input = self._with_input is not self._plain and field("input").strip()
        pieces = self._with_input if with_input else self._plain
        return "".join(literal + (field(name) if name is not None else "") for literal, name in pieces)


def check_chat_template(template: Template, tokenizer: Any) -> None:
    """The tokenizer can do what the template asks of it.

    Raises:
        ValueError: if the template is "chat" and the tokenizer has none.
    """
    if template.is_chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{KEY}: 'chat' was asked for, but the tokenizer {tokenizer.name_or_path!r} has no chat template. "
            "Use 'alpaca' or a string of your own."
        )


def _parse(text: str) -> list[tuple[str, str | None]]:
    """Pairs of a literal and the field that follows it."""
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(
            f"{KEY}: {text!r} is not a template: {error}. Write a brace that is no field as {{{{ or }}}}."
        ) from error
    for _, name, spec, conversion in parsed:
        if name is not None and (not name.strip() or spec or conversion or name != name.strip()):
            raise ValueError(
                f"{KEY}: {text!r} may hold names of fields only, as {{instruction}}; no {{}}, formats or conversions."
            )
    if not any(name is not None for _, name, _, _ in parsed):
        raise ValueError(
            f"{KEY}: {text!r} is neither 'alpaca' nor 'chat', and as a string of your own it names no field in braces."
        )
    return [(literal, name) for literal, name, _, _ in parsed]
