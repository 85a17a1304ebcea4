"""Token ids of texts, and what a tokenizer is made of."""

from __future__ import annotations

import json
from typing import Any

from lit_distill.data.cache import digest


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without the special tokens that the tokenizer would add."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def tokenizer_content(tokenizer: Any) -> str:
    """A digest of everything in a tokenizer that affects its ids; tokenizer calls do not change it."""
    if getattr(tokenizer, "is_fast", False):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content.pop("truncation", None)  # these two are set by the last call
        content.pop("padding", None)
    else:
        content = {
            "class": type(tokenizer).__qualname__,
            "vocab": tokenizer.get_vocab(),
            "init": repr(tokenizer.init_kwargs),
        }
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest(content, special, tokenizer.chat_template)
