"""The special tokens around prompts and responses: those that a tokenizer adds before a text, and those that end a turn."""

from __future__ import annotations

from typing import Any

from lit_distill.data.templates import Template

PROBE = "\ue011\ue022\ue033"
"""A response that is in no chat template and no conversation, to find where the template writes a response."""


def prompt_prefix(tokenizer: Any, template: Template) -> list[int]:
    """The special tokens that the tokenizer adds before a text, such as BOS; empty for chat templates, which add their own."""
    if template.is_chat:
        return []
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    default = tokenizer("a")["input_ids"]
    for start in range(len(default) - len(plain) + 1):
        if default[start : start + len(plain)] == plain:
            return default[:start]
    return []


def with_prefix(prefix: list[int], ids: list[int]) -> list[int]:
    """``prefix + ids``, or ``ids`` if they already begin with the prefix."""
    return ids if prefix and ids[: len(prefix)] == prefix else prefix + ids


def adds_special_tokens(tokenizer: Any, text: str, ids: list[int]) -> bool:
    """Whether ``ids`` begin with special tokens that the tokenizer added and that ``text`` itself does not contain.

    Args:
        tokenizer: the tokenizer of the ids.
        text: a prompt.
        ids: token ids of the prompt as the model gets them, possibly truncated.
    """
    prefix = prompt_prefix(tokenizer, Template("{prompt}"))
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(prefix) and ids[: len(prefix)] == prefix and plain[: len(prefix)] != prefix


def turn_end(tokenizer: Any) -> list[int]:
    """The ids that the chat template adds after a response, up to the first special token; empty if it adds none.

    ``<end_of_turn>`` for Gemma, ``<|end|>`` for Phi-3, ``<|im_end|>`` for ChatML, also if EOS is another token.
    """
    text = turn_end_text(tokenizer)
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def turn_end_text(tokenizer: Any) -> str:
    """What the chat template adds after a response, up to the first special token; empty if it adds none."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # noqa: BLE001 - templates may raise any error, for example if there is no system message
        return ""
    rest = text.rpartition(PROBE)[2]
    special = {*tokenizer.all_special_tokens, *(str(token) for token in tokenizer.added_tokens_decoder.values())}
    ends = [rest.index(token) + len(token) for token in special if token and token in rest]
    return rest[: min(ends)] if ends else ""


def response_end(tokenizer: Any, template: Template) -> list[int]:
    """The ids that end a response: those of the chat template or, without one, EOS.

    Raises:
        ValueError: if the tokenizer has no EOS and the template does not end a response.
    """
    return (turn_end(tokenizer) if template.is_chat else []) or [required_eos(tokenizer)]


def required_eos(tokenizer: Any) -> int:
    """The EOS id of the tokenizer.

    Raises:
        ValueError: if the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer: {tokenizer.name_or_path!r} has no EOS token, so responses could never end. "
            "Set `eos_token` in its tokenizer_config.json."
        )
    return tokenizer.eos_token_id
