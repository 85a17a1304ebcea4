"""Teachers known from a few tokens of each row: the most probable ones, or drawn ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_distill.functional.host import to_device

LEAST_TAIL = torch.finfo(torch.float32).eps
"""Smallest mass of the tail. Stored numbers do not say better how much is left; rounded to bfloat16, they may add up to over 1."""

Tail = Literal["spread", "renormalize"]


@dataclass(frozen=True, eq=False)
class TopKRows:
    """`TeacherRows` from the k most probable tokens; approximate, except for the log-probabilities of the labels.

    Args:
        ids: ``[N, k]`` int64, distinct in a row.
        logprobs: ``[N, k]``, normalised over the whole vocabulary, the most probable first.
        labels: ``[N]`` int64: the tokens of the text.
        exact_label_logprobs: ``[N]``: their log-probabilities, whether or not they are among the k.
        vocabulary_size: V.
        tail: what the other tokens get. ``spread``: the mass that the k tokens leave, at least `LEAST_TAIL`, in equal shares; a
            label outside the k first takes its own. ``renormalize``: nothing; the k log-probabilities are normalised.
    """

    ids: Tensor
    logprobs: Tensor
    labels: Tensor
    exact_label_logprobs: Tensor
    vocabulary_size: int
    tail: Tail = "spread"

    def __post_init__(self) -> None:
        if self.tail not in {"spread", "renormalize"}:
            raise ValueError(f"tail: expected spread or renormalize, got {self.tail!r}.")
        num_rows, k = self.ids.shape
        assert self.logprobs.shape == (num_rows, k)
        assert self.labels.shape == self.exact_label_logprobs.shape == (num_rows,)
        assert 1 <= k <= self.vocabulary_size

    def logits(self, rows: slice) -> Tensor:
        """See `TeacherRows`; these are log-probabilities."""
        ids, logprobs = self.ids[rows], self.logprobs[rows].float()
        if self.tail == "renormalize":
            empty = logprobs.new_full((len(ids), 1), -torch.inf)
            return empty.expand(-1, self.vocabulary_size).scatter(1, ids, logprobs.log_softmax(-1))
        label = self.labels[rows].unsqueeze(-1)
        exact = self.exact_label_logprobs[rows].float().unsqueeze(-1)
        is_label = ids == label
        logprobs = torch.where(is_label, exact, logprobs)  # one value for a token that is scattered twice
        outside = ~is_label.any(-1, keepdim=True)
        # expm1: beside a first token close to 1, its rounded probability would hide what the others share
        tail_mass = -torch.expm1(logprobs[:, :1]) - logprobs[:, 1:].exp().sum(-1, keepdim=True) - exact.exp() * outside
        num_others = self.vocabulary_size - ids.shape[-1] - outside.long()
        share = tail_mass.clamp(min=LEAST_TAIL).log() - num_others.log()  # +inf if there are no others, but then unused
        return share.expand(-1, self.vocabulary_size).scatter(
            1, torch.cat([ids, label], -1), torch.cat([logprobs, exact], -1)
        )

    def label_logprobs(self, labels: Tensor, chunk_rows: int | None = None) -> Tensor:
        """See `TeacherRows`; exact, as recorded, for the recorded labels only."""
        assert torch.equal(labels, self.labels), "the labels are not those whose log-probabilities were recorded"
        return self.exact_label_logprobs.float()


@dataclass(frozen=True, eq=False)
class DrawnRows:
    """`TeacherRows` from tokens drawn from the teacher, see `lit_distill.functional.sparse.draw`.

    Unbiased, at temperature 1, for gradients linear in the teacher's probabilities: those of forward KL and cross-entropy. Biased
    for all others: Jensen-Shannon and skew divergences are not linear, and reverse KL is infinite outside the draws.

    Args:
        offsets: ``[N + 1]`` int64: the tokens of row i are ``offsets[i]`` to ``offsets[i + 1]``. Keep it on the CPU: then nothing
            waits for the device of the others.
        ids: ``[M]`` int64, distinct in a row.
        counts: ``[M]``: how often each was drawn; they add up to ``num_draws`` in every row.
        num_draws: per row.
        vocabulary_size: V.
    """

    offsets: Tensor
    ids: Tensor
    counts: Tensor
    num_draws: int
    vocabulary_size: int

    def logits(self, rows: slice) -> Tensor:
        """See `TeacherRows`; log-frequencies, -inf for tokens that were not drawn."""
        start, stop, step = rows.indices(len(self.offsets) - 1)
        assert step == 1
        sizes = self.offsets[start : stop + 1].diff()
        first, last = self.offsets[[start, stop]].tolist()
        row = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes, output_size=last - first)
        row = to_device(row, self.ids.device) if row.device.type == "cpu" else row
        logits = torch.full((len(sizes), self.vocabulary_size), -torch.inf, dtype=torch.float32, device=self.ids.device)
        logits[row, self.ids[first:last]] = (self.counts[first:last] / self.num_draws).log()
        return logits

    def label_logprobs(self, labels: Tensor, chunk_rows: int | None = None) -> Tensor:
        """Not known.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "form: draws do not give the log-probability of a token, since most tokens are never drawn. "
            "For objectives that need it, store the teacher in the form hidden or topk."
        )
