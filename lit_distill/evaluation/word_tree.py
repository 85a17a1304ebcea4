"""A prefix tree of the tokens of a few words: words with a common prefix share its rows of logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from lit_distill.models import LMHead
from lit_distill.models.lm_head import chunk_rows_for


class WordTree:
    """A prefix tree of the words that may follow a prompt; a node is a prefix, its row of logits predicts the next token.

    All words of one token use only the root, the end of the prompt. A longer word adds a node for each prefix that is new, and
    one more sequence for the model unless all these prefixes are nodes already.

    Args:
        words: token ids of each word.
        texts: the words as text, for error messages.

    Raises:
        ValueError: if a word has no tokens or is a prefix of another; the message begins with ``words``.
    """

    def __init__(self, words: Sequence[list[int]], texts: Sequence[str]) -> None:
        _check(words, texts)
        self.words = words
        self.rows: list[list[int]] = []
        """The words that the model has to process so that every node is computed."""
        places: dict[tuple[int, ...], int] = {}  # node -> index of its prediction among the tokens of all rows
        for word in sorted(words, key=len, reverse=True):
            new = {tuple(word[:end]): self.num_targets + end for end in range(len(word))}
            if not new.keys() <= places.keys():
                places = new | places
                self.rows.append(word)
        self.places = list(places.values())
        self.tokens = sorted({token for word in words for token in word})
        nodes = {node: number for number, node in enumerate(places)}
        self.steps = [
            [(nodes[tuple(word[:end])], self.tokens.index(token)) for end, token in enumerate(word)] for word in words
        ]
        """For each word and each of its tokens: the node that predicts it, and the index of the token in `tokens`."""

    @property
    def num_targets(self) -> int:
        """T, the number of tokens of all rows."""
        return sum(map(len, self.rows))

    def logprobs(self, hidden: Tensor, head: LMHead) -> Tensor:
        """Log-probability ``[B, W]`` float32 of each word: the sum over its tokens.

        Args:
            hidden: ``[B, T, H]`` hidden states that predict the T tokens of `rows` after each of B prompts.
            head: LM head of the model; applied only to the nodes, a chunk of rows at a time.

        Raises:
            ValueError: if student and teacher do not share a token of the words.
        """
        if self.tokens[-1] >= len(head.weight):
            raise ValueError(
                f"words: they have token ids up to {self.tokens[-1]}, but student and teacher share only the first "
                f"{len(head.weight)}. Choose other words."
            )
        nodes = hidden[:, self.places].flatten(0, 1)
        logprobs = nodes.new_zeros(len(nodes), len(self.tokens), dtype=torch.float32)
        size = chunk_rows_for(head)
        for start in range(0, len(nodes), size):
            logits = head.logits(nodes[start : start + size])
            logprobs[start : start + size] = logits[:, self.tokens] - logits.logsumexp(dim=-1, keepdim=True)
        table = logprobs.view(len(hidden), len(self.places), len(self.tokens))
        words = [torch.stack([table[:, node, token] for node, token in steps]).sum(dim=0) for steps in self.steps]
        return torch.stack(words, dim=-1)


def _check(words: Sequence[list[int]], texts: Sequence[str]) -> None:
    for word, text in zip(words, texts, strict=True):
        if not word:
            raise ValueError(f"words: the tokenizer gives no tokens for {text!r}. Choose another word.")
    for i, j in permutations(range(len(words)), 2):
        if words[i] == words[j]:
            raise ValueError(
                f"words: {texts[i]!r} and {texts[j]!r} are the same tokens {words[i]}. Change one of them."
            )
        if words[j][: len(words[i])] == words[i]:
            raise ValueError(
                f"words: the tokens of {texts[i]!r} {words[i]} are the beginning of those of {texts[j]!r} {words[j]}: "
                "every response with the second begins with the first, so their probabilities overlap and cannot be compared. "
                "Change one of them, or let both end with a full stop."
            )
