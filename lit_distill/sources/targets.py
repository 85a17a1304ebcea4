"""Which tokens of the texts are learnt: only the first of a response, or none that are special or between two marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lit_distill.types import Pairs, Sequences, check_sizes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass
class TargetFilter:
    """Leaves out targets of the training texts, of all objectives alike. Rewards and validations still count every token.

    With ``first_tokens`` alone the loss is that of cut responses, so let sources that generate also generate no more
    (``max_new_tokens``). Distilling only the first part of rollouts: https://arxiv.org/abs/2602.15260; leaving out special tokens:
    https://arxiv.org/abs/2603.25562, and the end of thinking: https://arxiv.org/abs/2608.14277.
    """

    first_tokens: int | None = None
    """Only the first so many targets of each text."""
    skip_special_tokens: bool = False
    """Leave out all special tokens, the one that ends a response too: the student then does not learn when to stop."""
    skip_tokens: list[str] = field(default_factory=list)
    """Leave out these tokens, each written as one token of the tokenizer, such as ``</think>``."""
    skip_between: dict[str, str] = field(default_factory=dict)
    """Leave out what stands between two tokens, and these: ``{<think>: </think>}``. Without its end, everything to the end."""

    def __post_init__(self) -> None:
        check_sizes(first_tokens=self.first_tokens)

    def apply(self, text: Sequences | Pairs, tokenizer: PreTrainedTokenizerBase) -> Sequences | Pairs:
        """The same text with fewer targets; of a pair of which one response keeps none, neither keeps any.

        Args:
            text: texts or pairs.
            tokenizer: the student's.

        Raises:
            ValueError: beginning with ``targets``, if a mark is not one token of the tokenizer.
        """
        if isinstance(text, Sequences):
            return text.with_targets(self.kept(text, tokenizer))
        chosen, rejected = self.kept(text.chosen, tokenizer), self.kept(text.rejected, tokenizer)
        both = chosen.any(dim=-1, keepdim=True) & rejected.any(dim=-1, keepdim=True)
        return Pairs(text.chosen.with_targets(chosen & both), text.rejected.with_targets(rejected & both))

    def kept(self, text: Sequences, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """``[B, S]`` bool on the CPU: the targets that are learnt; arguments and errors of `apply`."""
        targets, tokens = text.masks.targets, text.tokens_on_host
        kept = targets.clone()
        if self.first_tokens is not None:
            kept &= targets.cumsum(dim=-1) <= self.first_tokens
        left_out = [self._id(tokenizer, "skip_tokens", token) for token in self.skip_tokens]
        if self.skip_special_tokens:
            left_out += tokenizer.all_special_ids
        if left_out:
            kept &= ~torch.isin(tokens, torch.tensor(left_out))
        for first, last in self.skip_between.items():
            opens, closes = (self._id(tokenizer, "skip_between", token) for token in (first, last))
            kept &= ~_inside(tokens, opens, closes)
        return kept

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find the marks in the tokenizer.

        Raises:
            ValueError: beginning with ``targets``, if one is not one token.
        """
        for key, marks in (("skip_tokens", self.skip_tokens), ("skip_between", _flat(self.skip_between))):
            for mark in marks:
                self._id(tokenizer, key, mark)

    @staticmethod
    def _id(tokenizer: PreTrainedTokenizerBase, key: str, token: str) -> int:
        known = tokenizer.get_vocab().get(token)
        if known is None:
            raise ValueError(
                f"targets.{key}: {token!r} is not one token of the student's tokenizer. Write tokens as the tokenizer has them, "
                "such as those of tokenizer.json's added_tokens."
            )
        return int(known)


def _flat(marks: dict[str, str]) -> Sequence[str]:
    return [*marks.keys(), *marks.values()]


def _inside(tokens: Tensor, opens: int, closes: int) -> Tensor:
    """``[B, S]`` bool: from each opening mark to the next closing one, both included."""
    inside = torch.zeros_like(tokens, dtype=torch.bool)
    running = torch.zeros(len(tokens), dtype=torch.bool)
    for column, here in enumerate(tokens.unbind(dim=1)):
        running = running | (here == opens)
        inside[:, column] = running
        running = running & (here != closes)
    return inside
