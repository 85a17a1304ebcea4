"""Renders the fields of a record as a prompt: Alpaca template, chat template of the tokenizer, or the user's own string."""

from __future__ import annotations

from collections.abc import Callable, Collection
from string import Formatter
from typing import Any

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
    r"""A prompt template.

    Args:
        text: "alpaca", "chat", or a string with field names in braces, such as ``"Q: {question}\nA:"``. ``{{`` is a literal
            brace. Attributes, indices and formats are not allowed.

    Raises:
        ValueError: if the string contains no field or does not have this form.

    Source: the Alpaca prompt as MiniLLM uses it, https://arxiv.org/abs/2306.08543; the short form is used if the input is empty.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.is_chat = text == "chat"
        # a chat template needs the same fields as the short form of Alpaca; the tokenizer provides its text
        self._plain = _parse(ALPACA if text in {"alpaca", "chat"} else text)
        self._with_input = _parse(ALPACA_WITH_INPUT) if text == "alpaca" else self._plain
        self.variables = tuple(dict.fromkeys(name for _, name in self._plain if name is not None))

    def check(self, known: Collection[str]) -> None:
        """Check that every variable is a field.

        Raises:
            ValueError: if one is not; the message names the key, the variable and the existing fields.
        """
        for name in self.variables:
            if name not in known and not (self.is_chat and "prompt" in known):
                raise ValueError(
                    f"template: {self.text!r} needs the field {name!r}, which the data do not have. "
                    f"The fields are {', '.join(known)}. Use one of these, or map the field with fields."
                )

    def render(self, field: Callable[[str], str], tokenizer: Any, system: str = "", prompt: str = "") -> str:
        """The text of the prompt.

        Args:
            field: returns the text of a field, given its name.
            tokenizer: provides the chat template, if the template is "chat".
            system: the system message, if the template is "chat".
            prompt: what the user says, if the template is "chat"; by default instruction and input.
        """
        if self.is_chat:
            question = prompt or "\n\n".join(part for part in (field("instruction"), field("input")) if part)
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": question})
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        with_input = self._with_input is not self._plain and field("input").strip()
        pieces = self._with_input if with_input else self._plain
        return "".join(literal + (field(name) if name is not None else "") for literal, name in pieces)


def check_chat_template(template: Template, tokenizer: Any) -> None:
    """Check that the tokenizer has a chat template if the template is "chat".

    Raises:
        ValueError: if it has none.
    """
    if template.is_chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"template: the template is 'chat', but the tokenizer {tokenizer.name_or_path!r} has no chat template. "
            "Use 'alpaca' or your own string."
        )


def _parse(text: str) -> list[tuple[str, str | None]]:
    """Pairs of a literal text and the name of the field that follows it, None at the end."""
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(
            f"template: {text!r} is not a template: {error}. Write a literal brace as {{{{ or }}}}."
        ) from error
    for _, name, spec, conversion in parsed:
        if name is not None and (not name.strip() or spec or conversion or name != name.strip()):
            raise ValueError(
                f"template: {text!r} may only contain field names in braces, as {{instruction}}; no {{}}, formats or conversions."
            )
    if not any(name is not None for _, name, _, _ in parsed):
        raise ValueError(
            f"template: {text!r} is neither 'alpaca' nor 'chat', and contains no field in braces, such as {{instruction}}."
        )
    return [(literal, name) for literal, name, _, _ in parsed]
