"""Scores of generated responses against references, exact over batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_distill.evaluation.text import exact_match, rouge_l


class ResponseScores(Metric):
    """Mean ROUGE-L and exact match in percent, and mean length in tokens, of responses to prompts."""

    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]], lengths: Sequence[int]) -> None:
        """Add responses, the accepted responses to the same prompts, and how many tokens each response has."""
        scores = [
            (rouge_l(text, accepted), 100.0 * exact_match(text, accepted), float(length))
            for text, accepted, length in zip(texts, references, lengths, strict=True)
        ]
        if scores:
            self.sums += torch.tensor(scores, dtype=torch.float64).sum(dim=0).to(self.sums.device)
            self.count += len(scores)

    def compute(self) -> dict[str, Tensor]:
        """``rouge_l`` and ``exact_match`` in percent, ``response_length`` in tokens; NaN where nothing was answered."""
        rouge, exact, length = (self.sums / self.count).float()
        return {"rouge_l": rouge, "exact_match": exact, "response_length": length}
