"""Scores of generated responses against references, exact over batches and ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_distill.evaluation.text import exact_match, rouge_l

NGRAM = 4


class ResponseScores(Metric):
    """ROUGE-L and exact match in percent, length in tokens, and the share of distinct 4-grams of words, of responses."""

    full_state_update = False
    sums: Tensor
    count: Tensor
    ngrams: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("ngrams", [], dist_reduce_fx="cat")

    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]], lengths: Sequence[int]) -> None:
        """Add responses, the accepted responses to the same prompts, and how many tokens each response has."""
        scores = [
            (rouge_l(text, accepted), 100.0 * exact_match(text, accepted), float(length))
            for text, accepted, length in zip(texts, references, lengths, strict=True)
        ]
        if scores:
            self.sums += torch.tensor(scores, dtype=torch.float64).sum(dim=0).to(self.sums.device)
            self.count += len(scores)
            assert isinstance(self.ngrams, list)
            self.ngrams.append(_ngrams(texts).to(self.sums.device))

    def compute(self) -> dict[str, Tensor]:
        """ROUGE-L and exact match in percent, length in tokens, and distinct-4 where any response has four words."""
        rouge, exact, length = (self.sums / self.count).float()
        figures = {"rouge_l": rouge, "exact_match": exact, "response_length": length}
        ngrams = torch.cat(self.ngrams) if isinstance(self.ngrams, list) and self.ngrams else self.ngrams
        if isinstance(ngrams, Tensor) and len(ngrams):
            figures["distinct_4"] = torch.tensor(ngrams.unique().numel() / ngrams.numel(), device=rouge.device)
        return figures


def _ngrams(texts: Sequence[str]) -> Tensor:
    """[n] int64: a number for each run of four words, equal for equal ones, so that ranks can count them together."""
    words = [text.split() for text in texts]
    runs = [" ".join(row[i : i + NGRAM]) for row in words for i in range(len(row) - NGRAM + 1)]
    digests = [hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.int64)
