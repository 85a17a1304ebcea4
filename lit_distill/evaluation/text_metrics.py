"""Metrics of generated responses against references, exact over batches and ranks."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_distill.evaluation.checkers import Checker, score_of
from lit_distill.evaluation.ngrams import count_repeated, exact_match, rouge_l

NGRAM_SIZES = (1, 2, 3, 4)
"""Words per n-gram for ``distinct_n``; the last one is also used for ``repetition_n``."""
MEANS = ("rouge_l", "exact_match", "response_length", "unfinished")
CHECKED = "answer_accuracy"
"""Mean score of a checker; ``accuracy`` is that of next tokens, see `CalibrationMetric`."""


@dataclass(frozen=True)
class Bucket:
    """A range of reference lengths: ``low`` to ``high`` words, both included; no upper limit if ``high`` is None."""

    low: int
    high: int | None

    @property
    def label(self) -> str:
        """The name shown to users."""
        if self.high is None:
            return f"over {self.low - 1} words" if self.low else "any words"
        return f"{self.low}-{self.high} words" if self.low else f"under {self.high + 1} words"

    @property
    def tag(self) -> str:
        """The label with ``_`` instead of spaces, as TensorBoard requires for a tag."""
        return self.label.replace(" ", "_")


class GenerationMetrics(Metric):
    """Metrics of responses: over all of them, and by the length of the reference.

    Means over responses: ROUGE-L and exact match in percent, length in tokens, ``unfinished`` (share cut off at
    max_new_tokens); with a checker also ``answer_accuracy``, its score in percent. Over the n-grams of words of all responses
    together: ``distinct_1`` to ``distinct_4``, the number of different n-grams divided by the number of all, and ``repetition_4``,
    the share of 4-grams that occur earlier in the same response.

    Different n-grams are counted by 64-bit digests. Ranks exchange the digests once, in `compute`: about 32 bytes per word,
    2 MB for 500 responses of 120 words.

    Args:
        bucket_starts: ascending numbers of words at which a bucket of reference lengths begins, besides the one at 0. If there are
            several references, the length of the first one counts.
        checker: decides which responses are correct.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor
    ngram_counts: Tensor
    repeated: Tensor
    digests: list[Tensor] | Tensor

    def __init__(self, bucket_starts: Sequence[int] = (), checker: Checker | None = None) -> None:
        super().__init__()
        self.checker = checker
        self.names = MEANS if checker is None else (*MEANS, CHECKED)
        self.starts = list(bucket_starts)
        lows = [0, *self.starts]
        self.buckets = [
            Bucket(low, high) for low, high in zip(lows, [*(s - 1 for s in self.starts), None], strict=True)
        ]
        self.add_state("sums", torch.zeros(len(lows), len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(lows), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("ngram_counts", torch.zeros(len(NGRAM_SIZES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("repeated", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("digests", [], dist_reduce_fx="cat")

    def update(
        self,
        texts: Sequence[str],
        references: Sequence[Sequence[str]],
        lengths: Sequence[int],
        finished: Sequence[bool],
    ) -> None:
        """Add responses. A rank without responses must call this too, because ranks exchange digests.

        Args:
            texts: the text of each response.
            references: the accepted responses to the same prompts; a response whose prompt has none does not count.
            lengths: number of tokens of each response.
            finished: whether each response ended before max_new_tokens.

        Raises:
            ArgumentError: of the checker, if it cannot read a reference.
        """
        rows = [row for row in zip(texts, references, lengths, finished, strict=True) if row[1]]
        texts = [text for text, *_ in rows]
        for text, accepted, length, ended in rows:
            bucket = bisect_right(self.starts, len(accepted[0].split()))
            scores = [rouge_l(text, accepted), 100.0 * exact_match(text, accepted), float(length), float(not ended)]
            if self.checker is not None:
                scores.append(100.0 * score_of(self.checker, text, accepted))
            self.sums[bucket] += self.sums.new_tensor(scores)
            self.counts[bucket] += 1
            self.repeated += count_repeated(text.split(), NGRAM_SIZES[-1])
        digests = [[_digest(ngram, n) for text in texts for ngram in _ngrams(text, n)] for n in NGRAM_SIZES]
        self.ngram_counts += self.ngram_counts.new_tensor([len(row) for row in digests])
        assert isinstance(self.digests, list)
        different = sorted({digest for row in digests for digest in row})
        self.digests.append(torch.tensor(different, dtype=torch.int64, device=self.ngram_counts.device))

    def compute(self) -> dict[str, Tensor]:
        """The metrics by name, ``[]`` each; ``name/tag`` for each bucket with responses. Empty without responses.

        A metric of n-grams is missing if no response has n words.
        """
        if not self.counts.sum():
            return {}
        metrics = dict(zip(self.names, (self.sums.sum(dim=0) / self.counts.sum()).float(), strict=True))
        digests = torch.cat(self.digests) if isinstance(self.digests, list) else self.digests
        sizes = digests.unique() & 3
        for index, n in enumerate(NGRAM_SIZES):
            if self.ngram_counts[index]:
                metrics[f"distinct_{n}"] = ((sizes == index).sum() / self.ngram_counts[index]).float()
        if self.ngram_counts[-1]:
            metrics[f"repetition_{NGRAM_SIZES[-1]}"] = (self.repeated / self.ngram_counts[-1]).float()
        for bucket, sums, count in zip(self.buckets, self.sums, self.counts, strict=True):
            if count and self.starts:
                means = dict(zip(self.names, (sums / count).float(), strict=True))
                metrics |= {f"{name}/{bucket.tag}": mean for name, mean in means.items()}
                metrics[f"count/{bucket.tag}"] = count.float()
        return metrics


def _ngrams(text: str, n: int) -> list[str]:
    words = text.split()
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


def _digest(ngram: str, n: int) -> int:
    """A signed 64-bit hash of an n-gram, the same on all ranks; its last two bits are n − 1."""
    number = int.from_bytes(hashlib.blake2b(ngram.encode(), digest_size=8).digest(), "big", signed=True)
    return number & ~3 | (n - 1)
