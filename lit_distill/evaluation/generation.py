"""Scores of generated responses against references, exact over batches and ranks."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_distill.evaluation.text import count_repeated, exact_match, rouge_l

SIZES = (1, 2, 3, 4)
"""Words of the runs whose diversity is measured; the last one's repetition too."""
MEANS = ("rouge_l", "exact_match", "response_length", "unfinished")


@dataclass(frozen=True)
class Bucket:
    """References of ``low`` to ``high`` words, both included; without an end if ``high`` is None."""

    low: int
    high: int | None

    @property
    def label(self) -> str:
        """For readers; with ``_`` for spaces it is a tag that TensorBoard accepts."""
        if self.high is None:
            return f"over {self.low - 1} words" if self.low else "any words"
        return f"{self.low}-{self.high} words" if self.low else f"under {self.high + 1} words"

    @property
    def tag(self) -> str:
        """The label in one word."""
        return self.label.replace(" ", "_")


class ResponseScores(Metric):
    """Scores of responses: of all, and by the length of the reference.

    Means over responses: ROUGE-L and exact match in percent, length in tokens, ``unfinished`` (share cut off at
    max_new_tokens). Over all of them together: ``distinct_1`` to ``distinct_4``, the share of different runs of so many words
    among all, and ``repetition_4``, the share of runs of four that their own text already contains.

    Different runs are counted by 64-bit digests. Ranks exchange those of each batch's different runs once, in `compute`:
    about 32 bytes a word, 2 MB for 500 responses of 120 words.

    Args:
        bucket_starts: ascending numbers of words at which a bucket of reference lengths begins, besides the one at 0. Of several
            references the first counts.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor
    runs: Tensor
    repeated: Tensor
    digests: list[Tensor] | Tensor

    def __init__(self, bucket_starts: Sequence[int] = ()) -> None:
        super().__init__()
        self.starts = list(bucket_starts)
        lows = [0, *self.starts]
        self.buckets = [
            Bucket(low, high) for low, high in zip(lows, [*(s - 1 for s in self.starts), None], strict=True)
        ]
        self.add_state("sums", torch.zeros(len(lows), len(MEANS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(lows), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("runs", torch.zeros(len(SIZES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("repeated", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("digests", [], dist_reduce_fx="cat")

    def update(
        self,
        texts: Sequence[str],
        references: Sequence[Sequence[str]],
        lengths: Sequence[int],
        finished: Sequence[bool],
    ) -> None:
        """Add responses; a rank without any must call it too, since ranks exchange digests.

        Args:
            texts: the responses.
            references: the accepted responses to the same prompts, at least one each.
            lengths: tokens of each response.
            finished: whether each ended by itself.
        """
        for text, accepted, length, ended in zip(texts, references, lengths, finished, strict=True):
            bucket = bisect_right(self.starts, len(accepted[0].split()))
            scores = (rouge_l(text, accepted), 100.0 * exact_match(text, accepted), float(length), float(not ended))
            self.sums[bucket] += self.sums.new_tensor(scores)
            self.counts[bucket] += 1
            self.repeated += count_repeated(text.split(), SIZES[-1])
        digests = [[_digest(run, n) for text in texts for run in _runs(text, n)] for n in SIZES]
        self.runs += self.runs.new_tensor([len(row) for row in digests])
        assert isinstance(self.digests, list)
        different = sorted({digest for row in digests for digest in row})
        self.digests.append(torch.tensor(different, dtype=torch.int64, device=self.runs.device))

    def compute(self) -> dict[str, Tensor]:
        """``[]`` each, by name; those of a bucket that has responses as ``name/tag``. Empty without responses.

        What is a share of runs of n words is missing where no response has n.
        """
        if not self.counts.sum():
            return {}
        figures = dict(zip(MEANS, (self.sums.sum(dim=0) / self.counts.sum()).float(), strict=True))
        digests = torch.cat(self.digests) if isinstance(self.digests, list) else self.digests
        sizes = digests.unique() & 3
        for index, n in enumerate(SIZES):
            if self.runs[index]:
                figures[f"distinct_{n}"] = ((sizes == index).sum() / self.runs[index]).float()
        if self.runs[-1]:
            figures[f"repetition_{SIZES[-1]}"] = (self.repeated / self.runs[-1]).float()
        for bucket, sums, count in zip(self.buckets, self.sums, self.counts, strict=True):
            if count and self.starts:
                means = dict(zip(MEANS, (sums / count).float(), strict=True))
                figures |= {f"{name}/{bucket.tag}": mean for name, mean in means.items()}
                figures[f"count/{bucket.tag}"] = count.float()
        return figures


def _runs(text: str, n: int) -> list[str]:
    words = text.split()
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


def _digest(run: str, n: int) -> int:
    """A signed 64-bit number, equal for equal runs, so that ranks can count them together; its last two bits are n − 1."""
    number = int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big", signed=True)
    return number & ~3 | (n - 1)
