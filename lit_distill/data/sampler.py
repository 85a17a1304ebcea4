"""Selects the items of each batch: a pure function of seed, epoch and index, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import SequentialSampler
from torch.utils.data.distributed import DistributedSampler

WINDOW = 50  # number of batches sorted by length together: enough to save padding, few enough to keep the order random
ITEMS, CORPUS, VALIDATION = 0, 1, 2  # independent random streams of one seed


class Order(NamedTuple):
    """The settings that determine the order of the items of an epoch."""

    seed: int
    batch_size: int
    shuffle: bool
    group_by_length: bool
    tokens_per_batch: int | None = None


class BatchIndices(NamedTuple):
    """The indices that one rank loads for one batch: items, and rows of the corpus."""

    items: list[int]
    corpus: list[int]


def global_batches(
    lengths: np.ndarray,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool,
    group_by_length: bool,
    drop_last: bool,
    tokens_per_batch: int | None = None,
) -> list[np.ndarray]:
    """The batches of one epoch over all ranks; inside a batch, items are sorted from long to short.

    Args:
        lengths: ``[items]`` number of tokens of each item.
        batch_size: items per batch.
        seed: together with ``epoch``, seed of the order.
        epoch: counted from 0.
        shuffle: random order; otherwise the order of the items, or of their length with ``group_by_length``.
        group_by_length: batches of items of similar length: sorted inside windows of 50 batches if shuffled, otherwise from long
            to short over the whole epoch.
        drop_last: leave out the last items if they do not fill a batch, unless there is no other batch. If shuffled, these are
            different items in every epoch.
        tokens_per_batch: fill the batches to about so many tokens instead of ``batch_size`` items; every epoch has as many batches.
    """
    count = len(lengths)
    random = np.random.default_rng([seed, ITEMS, epoch])
    order = random.permutation(count) if shuffle else np.arange(count)
    if tokens_per_batch is not None:
        number = num_batches(lengths, batch_size, drop_last, tokens_per_batch)
        batches = split_by_tokens(order, lengths, tokens_per_batch, number, drop_last)
        if group_by_length:
            batches = _regrouped(batches, lengths, random)
        return [_long_first(batch, lengths) for batch in batches]
    if drop_last and count > batch_size:
        order = order[: count // batch_size * batch_size]
    # without shuffling, one window contains all items
    window = WINDOW * batch_size if shuffle else max(count, 1)
    if group_by_length:
        order = np.concatenate(
            [_long_first(order[at : at + window], lengths) for at in range(0, max(count, 1), window)]
        )
    batches = [_long_first(order[at : at + batch_size], lengths) for at in range(0, len(order), batch_size)]
    if shuffle and group_by_length:
        batches = [batches[index] for index in random.permutation(len(batches))]
    return batches


def num_batches(lengths: np.ndarray, batch_size: int, drop_last: bool, tokens_per_batch: int | None) -> int:
    """The number of batches of an epoch over all ranks."""
    if tokens_per_batch is None:
        full, rest = divmod(len(lengths), batch_size)
        return full + int(rest > 0 and not (drop_last and full > 0))
    full, rest = divmod(int(lengths.sum()), tokens_per_batch)
    return max(1, min(len(lengths), full + int(rest > 0 and not drop_last)))


def split_by_tokens(
    order: np.ndarray, lengths: np.ndarray, tokens_per_batch: int, number: int, drop_last: bool
) -> list[np.ndarray]:
    """The items in ``number`` batches of about ``tokens_per_batch`` tokens: an item is in the batch in which its middle lies.

    No batch is empty if there are ``number`` items: a batch before a long item gets one of its neighbour's.

    Args:
        order: the items.
        lengths: number of tokens of every item of the epoch.
        tokens_per_batch: tokens of a batch.
        number: number of batches.
        drop_last: leave out the items after the last batch; otherwise they are in it.
    """
    sizes = lengths[order]
    batch = ((np.cumsum(sizes) - sizes / 2) // tokens_per_batch).astype(np.int64)
    kept = batch < number
    if drop_last and number > 1 and kept.sum() >= number:
        order, batch = order[kept], batch[kept]
    first = np.arange(1, number)
    spare = np.searchsorted(np.minimum(batch, number - 1), first) - first  # items beyond one for each batch before
    spare = np.maximum.accumulate(spare.clip(min=0)).clip(max=max(0, len(order) - number))
    return np.split(order, spare + first)


def _regrouped(batches: list[np.ndarray], lengths: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
    """Within windows of batches, texts of like length in one batch; the number of tokens of each batch stays about the same."""
    regrouped = []
    for start in range(0, len(batches), WINDOW):
        window = batches[start : start + WINDOW]
        items = _long_first(np.concatenate(window), lengths)
        each = max(1, int(lengths[items].sum()) // len(window))
        parts = split_by_tokens(items, lengths, each, len(window), drop_last=False)
        regrouped += [parts[index] for index in random.permutation(len(parts))]
    return regrouped


def _long_first(items: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return items[np.argsort(-lengths[items], kind="stable")]


def validation_mask(count: int, size: int | float, seed: int) -> np.ndarray:  # noqa: PYI041 - as the YAML has it
    """``[count]`` bool: which training items are used for validation. The choice does not depend on their lengths.

    Args:
        count: training items.
        size: number of items (int), or share of them (float, at least one item).
        seed: seed of the choice.

    Raises:
        ValueError: if no training item would remain.
    """
    number = max(1, round(size * count)) if isinstance(size, float) else size
    if number >= count:
        raise ValueError(f"validation_size: {size} was given, but train has only {count} items. Make it smaller.")
    mask = np.zeros(count, dtype=bool)
    mask[np.random.default_rng([seed, VALIDATION]).permutation(count)[:number]] = True
    return mask


class CorpusOrder:
    """Selects the corpus rows of each batch of the run; they are shuffled again each time all of them have been used.

    Args:
        num_rows: number of rows of the corpus.
        batch_size: rows per batch over all ranks.
        seed: seed of the order.
    """

    offset = 0
    """Row position of batch 0 of the run; not 0 if the run was resumed with another batch size."""

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self._last: tuple[int, np.ndarray] | None = None

    def rows(self, index: int) -> list[int]:
        """The rows of batch ``index`` of the run, over all ranks; a pure function of seed and index."""
        first = self.position(index)
        return [self._row(position) for position in range(first, first + self.batch_size)]

    def position(self, index: int) -> int:
        """Number of rows used before batch ``index`` of the run."""
        return index * self.batch_size + self.offset

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_rows)
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, np.random.default_rng([self.seed, CORPUS, epoch]).permutation(self.num_rows))
        return int(self._last[1][offset])


# Lightning does not replace a DistributedSampler in distributed runs, nor a SequentialSampler under `overfit_batches`
class GlobalBatchSampler(DistributedSampler, SequentialSampler):
    """Yields the share of one rank of every global batch: rank r of W takes ``b[r::W]`` of batch b.

    A share is empty if a batch has fewer items than there are ranks; all ranks have the same number of batches.

    Args:
        lengths: number of tokens of each item.
        batch_size: items per batch over all ranks.
        seed: together with the epoch, seed of the order.
        shuffle: a new random order in each epoch, as in training; otherwise always the same order, as in evaluation.
        group_by_length: batches of items of similar length.
        drop_last: leave out the last items if they do not fill a batch.
        rank: rank of this process among those that share the data.
        world_size: number of processes that share the data.
        corpus: selects the corpus rows of each batch, if there is a corpus.
        tokens_per_batch: fill the batches to about so many tokens instead of ``batch_size`` items.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        group_by_length: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        corpus: CorpusOrder | None = None,
        tokens_per_batch: int | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths)
        super().__init__(
            self.lengths,  # type: ignore[arg-type]
            num_replicas=world_size,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        self.batch_size = batch_size
        self.group_by_length = group_by_length
        self.corpus = corpus
        self.tokens_per_batch = tokens_per_batch
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self.order = Order(self.seed, self.batch_size, self.shuffle, self.group_by_length, self.tokens_per_batch)
        # batches done before, and number of items of each batch after them
        self._sizes: tuple[int, np.ndarray] | None = None
        self.start = 0  # number of batches of the epoch that are done, and of items in them
        self.items = 0

    def set_epoch(self, epoch: int) -> None:
        """Start another epoch at its first batch; does nothing if ``epoch`` is the current epoch."""
        if epoch != self.epoch:
            self._begin(epoch)

    def skip(self, batches: int, epoch: int | None = None) -> None:
        """Start this epoch (or another) after ``batches`` batches, to resume a run; valid until the epoch changes."""
        self._begin(self.epoch if epoch is None else epoch)
        items = min(batches * self.batch_size, self._num_items())
        if self.tokens_per_batch is not None:
            items = int(self._batch_sizes()[:batches].sum())
        self.start, self.items = batches, items

    def state_after(self, batches: int) -> dict[str, Any]:
        """The position in this epoch after ``batches`` batches; a run with any batch size can resume from it.

        Args:
            batches: number of batches of the epoch that are done, at least ``self.start``.
        """
        taken = batches - self.start
        if self._has_tokens():
            items = int(self._batch_sizes()[:taken].sum())
        elif self._batch_size_changed():
            size, longer = divmod(self._num_remaining(), max(1, len(self) - self.start))
            items = taken * size + min(taken, longer)
        else:
            items = min(taken * self.batch_size, self._num_remaining())
        state = {"epoch": self.epoch, "batches": batches, "items": self.items + items, "order": self.order._asdict()}
        rows = {} if self.corpus is None else {"corpus_rows": self.corpus.position(self.epoch * len(self) + batches)}
        return {**state, **rows}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Resume at the position given by `state_after`; valid until the epoch changes.

        The order of the items of this epoch does not change, even if the seed or the batch size has changed. With another batch
        size, the remaining items are split into batches of the new size, so no item is used twice.
        """
        self._begin(state["epoch"])
        if "items" not in state:  # an older checkpoint, which counts batches only
            self.skip(state["batches"])
            return
        self.order, self.items = Order(**state["order"]), state["items"]
        same = self._has_tokens() and not self._batch_size_changed()
        self.start = state["batches"] if same else len(self) - self._num_remaining_batches()
        if self.corpus is not None and "corpus_rows" in state:
            self.corpus.offset += state["corpus_rows"] - self.corpus.position(self.epoch * len(self) + self.start)

    def _num_remaining_batches(self) -> int:
        """Number of batches for the remaining items of an epoch that began with batches of another size, or of the same."""
        left = self._num_items() - self.items
        if left <= 0:
            return 0
        if self._has_tokens():
            return max(1, min(len(self), round(left / self._num_items() * len(self))))
        return max(1, min(-(-left // self.batch_size), len(self) - self.items // self.batch_size))

    def _num_items(self) -> int:
        """Number of items of the epoch, without those that ``drop_last`` left out when the epoch began."""
        if self.order.tokens_per_batch is not None:
            return sum(map(len, self._epoch_batches()))
        full, rest = divmod(len(self.lengths), self.order.batch_size)
        return len(self.lengths) - (rest if self.drop_last and full else 0)

    def _num_remaining(self) -> int:
        """Number of remaining items of the epoch."""
        left = self._num_items() - self.items
        return left if self._has_tokens() else min(left, (len(self) - self.start) * self.batch_size)

    def _batch_size_changed(self) -> bool:
        """Whether the batch size differs from the one at the start of the epoch."""
        return (self.order.batch_size, self.order.tokens_per_batch) != (self.batch_size, self.tokens_per_batch)

    def _has_tokens(self) -> bool:
        """Whether batches are filled to a number of tokens, now or when the epoch began."""
        return self.tokens_per_batch is not None or self.order.tokens_per_batch is not None

    def _batch_sizes(self) -> np.ndarray:
        """Number of items of each remaining batch of the epoch."""
        if self._sizes is None or self._sizes[0] != self.start:
            self._sizes = self.start, np.array([len(batch) for batch in self._batches()], dtype=np.int64)
        return self._sizes[1]

    def _epoch_batches(self) -> list[np.ndarray]:
        """All global batches of the epoch, as it began."""
        return global_batches(
            self.lengths,
            self.order.batch_size,
            seed=self.order.seed,
            epoch=self.epoch,
            shuffle=self.order.shuffle,
            group_by_length=self.order.group_by_length,
            drop_last=self.drop_last,
            tokens_per_batch=self.order.tokens_per_batch,
        )

    def _batches(self) -> list[np.ndarray]:
        """The remaining global batches of the epoch."""
        batches = self._epoch_batches()
        if not self._batch_size_changed():
            return batches[self.start :]
        left = np.concatenate(batches)[self.items :][: self._num_remaining()]
        number = len(self) - self.start
        if self.tokens_per_batch is not None and number > 0:
            each = max(1, int(self.lengths[left].sum()) // number)
            parts = split_by_tokens(left, self.lengths, each, number, drop_last=False)
            return [_long_first(part, self.lengths) for part in parts]
        return [_long_first(part, self.lengths) for part in np.array_split(left, max(1, len(self) - self.start))]

    def __iter__(self) -> Iterator[BatchIndices]:  # type: ignore[override]
        first = self.epoch * len(self)
        for index, batch in enumerate(self._batches(), start=self.start):
            corpus = self.corpus.rows(first + index) if self.corpus is not None else []
            mine = slice(self.rank, None, self.num_replicas)
            yield BatchIndices(batch[mine].tolist(), corpus[mine])

    def __len__(self) -> int:
        """Number of batches of a whole epoch, the same on all ranks, also if the epoch was resumed."""
        return num_batches(self.lengths, self.batch_size, self.drop_last, self.tokens_per_batch)
