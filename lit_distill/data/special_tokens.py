"""The special tokens around prompts and responses: what a tokenizer puts before a text, and what ends a turn."""

from __future__ import annotations

from typing import Any

from lit_distill.data.templates import Template

PROBE = "lorem ipsum 4711"
"""A response that no chat template writes by itself; what follows it is the end of a turn."""


def prompt_prefix(tokenizer: Any, template: Template) -> list[int]:
    """The special tokens that the tokenizer puts before a text, such as BOS; chat templates write their own."""
    if template.is_chat:
        return []
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    default = tokenizer("a")["input_ids"]
    for start in range(len(default) - len(plain) + 1):
        if default[start : start + len(plain)] == plain:
            return default[:start]
    return []


def with_prefix(prefix: list[int], ids: list[int]) -> list[int]:
    """``ids`` after ``prefix``, which is not put there twice if the text itself begins with it."""
    return ids if prefix and ids[: len(prefix)] == prefix else prefix + ids


def adds_special_tokens(tokenizer: Any, text: str, ids: list[int]) -> bool:
    """Whether ``ids`` are those of ``text`` after tokens that the tokenizer puts before it, and the text does not write.

    Args:
        tokenizer: of the ids.
        text: a prompt.
        ids: the same as a model reads it, perhaps without tokens that were too many.
    """
    prefix = prompt_prefix(tokenizer, Template("{prompt}"))
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(prefix) and ids[: len(prefix)] == prefix and plain[: len(prefix)] != prefix


def turn_end(tokenizer: Any) -> list[int]:
    """The ids with which the chat template ends a response, up to the first special token; empty if it writes none.

    ``<end_of_turn>`` for Gemma, ``<|end|>`` for Phi-3, ``<|im_end|>`` for ChatML, also where EOS is another token.
    """
    if not getattr(tokenizer, "chat_template", None):
        return []
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # noqa: BLE001 - templates raise what they like, such as for a missing system message
        return []
    ids = tokenizer(text.rpartition(PROBE)[2], add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    last = next((position for position, token in enumerate(ids) if token in special), None)
    return [] if last is None else ids[: last + 1]


def response_end(tokenizer: Any, template: Template) -> list[int]:
    """The ids that end a response: as the chat template writes them, else EOS.

    Raises:
        ValueError: if the tokenizer has no EOS and the template writes no end.
    """
    return (turn_end(tokenizer) if template.is_chat else []) or [required_eos(tokenizer)]


def required_eos(tokenizer: Any) -> int:
    """The id that ends a text.

    Raises:
        ValueError: if the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"data.init_args.tokenizer: {tokenizer.name_or_path!r} has no EOS token, so responses could never end. "
            "Set `eos_token` in its tokenizer_config.json."
        )
    return tokenizer.eos_token_id
