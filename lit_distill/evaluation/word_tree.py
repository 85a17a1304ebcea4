"""The tokens of a few words as a tree: the probability of each word from as few rows of logits as there are branchings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from lit_distill.models.chunked_head import chunk_rows_for
from lit_distill.models.head import Head


class WordTree:
    """Words that may follow a prompt; a node is a beginning of a word, and its row of logits says what comes next.

    Words of one token all hang on one node, the end of the prompt. A longer word adds a node for each of its own
    beginnings, and one more text to read unless another word begins as it does.

    Args:
        words: the tokens of each.
        texts: the same as text, for messages.
        key: where they stand in the YAML.

    Raises:
        ValueError: naming the key, for a word without tokens, or one that is the beginning of another.
    """

    def __init__(self, words: Sequence[list[int]], texts: Sequence[str], key: str) -> None:
        _check(words, texts, key)
        self.key = key
        self.words = words
        self.rows: list[list[int]] = []
        """The words that a model has to read to pass every node."""
        places: dict[tuple[int, ...], int] = {}  # node -> which of the tokens of all rows it predicts
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
        """Of each word, the node and the token (as an index of `tokens`) of each step."""

    @property
    def num_targets(self) -> int:
        """T, the tokens of all rows."""
        return sum(map(len, self.rows))

    def logprobs(self, hidden: Tensor, head: Head) -> Tensor:
        """Log-probability ``[B, W]`` float32 of each word: the sum over its tokens.

        Args:
            hidden: ``[B, T, H]``: after each of B prompts, what predicts the T tokens of `rows`.
            head: of the model; applied to the nodes alone, a few at a time.

        Raises:
            ValueError: if a token is none that student and teacher share.
        """
        if self.tokens[-1] >= len(head.weight):
            raise ValueError(
                f"{self.key}: their tokens go up to {self.tokens[-1]}, but student and teacher share only the first "
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


def _check(words: Sequence[list[int]], texts: Sequence[str], key: str) -> None:
    for word, text in zip(words, texts, strict=True):
        if not word:
            raise ValueError(f"{key}: the tokenizer makes nothing of {text!r}. Choose another word.")
    for i, j in permutations(range(len(words)), 2):
        if words[i] == words[j]:
            raise ValueError(
                f"{key}: {texts[i]!r} and {texts[j]!r} are the same tokens {words[i]}. Change one of them."
            )
        if words[j][: len(words[i])] == words[i]:
            raise ValueError(
                f"{key}: the tokens of {texts[i]!r} {words[i]} are the beginning of those of {texts[j]!r} {words[j]}: "
                "whoever says the second has said the first, so their probabilities overlap and cannot be compared. "
                "Change one of them, or let both end in a mark, as a full stop."
            )
