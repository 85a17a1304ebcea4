"""Which items make a batch: a pure function of seed, epoch and index, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import SequentialSampler
from torch.utils.data.distributed import DistributedSampler

WINDOW = 50  # batches whose items are sorted by length together: enough to save padding, few enough to stay random
ITEMS, CORPUS, VALIDATION = 0, 1, 2  # separate random streams of one seed


class Order(NamedTuple):
    """What decides in which order the items of an epoch are read."""

    seed: int
    batch_size: int
    shuffle: bool
    group_by_length: bool


class BatchIndices(NamedTuple):
    """What one rank loads for one batch."""

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
) -> list[np.ndarray]:
    """The batches of one epoch over all ranks; inside a batch, long items come first.

    Args:
        lengths: [items] tokens of each.
        batch_size: items of a batch.
        seed: with ``epoch``, decides the order.
        epoch: counts from 0.
        shuffle: random order; else the order of the items, or of their length.
        group_by_length: batches of like length: shuffled, within windows of 50 batches; else long to short.
        drop_last: leave out the items that fill no batch, another few in every epoch, unless there is no other batch.
    """
    count = len(lengths)
    random = np.random.default_rng([seed, ITEMS, epoch])
    order = random.permutation(count) if shuffle else np.arange(count)
    if drop_last and count > batch_size:
        order = order[: count // batch_size * batch_size]
    # unshuffled, one window holds everything
    window = WINDOW * batch_size if shuffle else max(count, 1)
    if group_by_length:
        order = np.concatenate(
            [_long_first(order[at : at + window], lengths) for at in range(0, max(count, 1), window)]
        )
    batches = [_long_first(order[at : at + batch_size], lengths) for at in range(0, len(order), batch_size)]
    if shuffle and group_by_length:
        batches = [batches[index] for index in random.permutation(len(batches))]
    return batches


def _long_first(items: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return items[np.argsort(-lengths[items], kind="stable")]


def validation_mask(count: int, size: int | float, seed: int) -> np.ndarray:  # noqa: PYI041 - as the YAML has it
    """[count] bool: which training items are taken for validation; their lengths play no part.

    Args:
        count: training items.
        size: how many to take (int), or which share of them (float, at least one item).
        seed: decides which.

    Raises:
        ValueError: if none would remain.
    """
    number = max(1, round(size * count)) if isinstance(size, float) else size
    if number >= count:
        raise ValueError(
            f"data.init_args.validation_size is {size}, but train has only {count} items. Make it smaller."
        )
    mask = np.zeros(count, dtype=bool)
    mask[np.random.default_rng([seed, VALIDATION]).permutation(count)[:number]] = True
    return mask


class CorpusOrder:
    """Which corpus rows go with batch i of the run: they are shuffled anew each time all of them have been used.

    Args:
        num_rows: rows of the corpus.
        batch_size: rows of a batch over all ranks.
        seed: decides the order.
    """

    offset = 0
    """Where batch 0 would begin; not 0 where a run goes on with batches of another size."""

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
        """How many rows are used before batch ``index`` of the run."""
        return index * self.batch_size + self.offset

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_rows)
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, np.random.default_rng([self.seed, CORPUS, epoch]).permutation(self.num_rows))
        return int(self._last[1][offset])


# Lightning leaves a DistributedSampler alone in distributed runs, and a SequentialSampler alone under `overfit_batches`
class GlobalBatchSampler(DistributedSampler, SequentialSampler):
    """Yields one rank's share of every global batch: of batch b, rank r of W takes ``b[r::W]``.

    A share may be empty where a batch has fewer items than there are ranks; all ranks have the same number of batches.

    Args:
        lengths: tokens of each item.
        batch_size: items of a batch over all ranks.
        seed: with the epoch, decides the order.
        shuffle: a new random order each epoch, as in training; else always the same, as in evaluation.
        group_by_length: batches of like length.
        drop_last: leave out the items that fill no batch.
        rank: of this process among those that share the data.
        world_size: how many share the data.
        corpus: which corpus rows ride along, if any.
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
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self.order = Order(self.seed, self.batch_size, self.shuffle, self.group_by_length)
        self.start = 0  # batches of the epoch that are behind, and items in them
        self.items = 0

    def set_epoch(self, epoch: int) -> None:
        """Start another epoch, from its first batch; the current one again changes nothing."""
        if epoch != self.epoch:
            self._begin(epoch)

    def skip(self, batches: int, epoch: int | None = None) -> None:
        """Begin this epoch (or another) after so many batches, until the epoch changes: so a run goes on."""
        self._begin(self.epoch if epoch is None else epoch)
        self.start, self.items = batches, min(batches * self.batch_size, self._kept())

    def state_after(self, batches: int) -> dict[str, Any]:
        """Where this epoch stands when so many of its batches are behind, for a run with batches of any size.

        Args:
            batches: of the epoch, at least those that were when this sampler began.
        """
        size, longer = divmod(self._left(), max(1, len(self) - self.start))
        taken = batches - self.start
        items = taken * size + min(taken, longer) if self._regroups() else min(taken * self.batch_size, self._left())
        state = {"epoch": self.epoch, "batches": batches, "items": self.items + items, "order": self.order._asdict()}
        rows = {} if self.corpus is None else {"corpus_rows": self.corpus.position(self.epoch * len(self) + batches)}
        return {**state, **rows}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Begin where `state_after` was, until the epoch changes.

        The order of an epoch stays what it was when the epoch began. Where another size of batches, or another seed, has been
        chosen since, the items that are left come in batches of the new size, none of them twice.
        """
        self._begin(state["epoch"])
        if "items" not in state:  # of a checkpoint that counts batches
            self.skip(state["batches"])
            return
        self.order, self.items = Order(**state["order"]), state["items"]
        left = self._kept() - self.items
        number = max(1, min(-(-left // self.batch_size), len(self) - self.items // self.batch_size)) if left > 0 else 0
        self.start = len(self) - number
        if self.corpus is not None and "corpus_rows" in state:
            self.corpus.offset += state["corpus_rows"] - self.corpus.position(self.epoch * len(self) + self.start)

    def _kept(self) -> int:
        """Items of the epoch: without those that filled no batch when it began."""
        full, rest = divmod(len(self.lengths), self.order.batch_size)
        return len(self.lengths) - (rest if self.drop_last and full else 0)

    def _left(self) -> int:
        """Items of the epoch that are to come."""
        return min(self._kept() - self.items, (len(self) - self.start) * self.batch_size)

    def _regroups(self) -> bool:
        """Whether the batches are of another size than those that the order was made for."""
        return self.order.batch_size != self.batch_size

    def _batches(self) -> list[np.ndarray]:
        """What is left of the epoch."""
        batches = global_batches(
            self.lengths,
            self.order.batch_size,
            seed=self.order.seed,
            epoch=self.epoch,
            shuffle=self.order.shuffle,
            group_by_length=self.order.group_by_length,
            drop_last=self.drop_last,
        )
        if not self._regroups():
            return batches[self.start :]
        left = np.concatenate(batches)[self.items :][: self._left()]
        return [_long_first(part, self.lengths) for part in np.array_split(left, max(1, len(self) - self.start))]

    def __iter__(self) -> Iterator[BatchIndices]:  # type: ignore[override]
        first = self.epoch * len(self)
        for index, batch in enumerate(self._batches(), start=self.start):
            corpus = self.corpus.rows(first + index) if self.corpus is not None else []
            mine = slice(self.rank, None, self.num_replicas)
            yield BatchIndices(batch[mine].tolist(), corpus[mine])

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on all ranks and wherever it begins."""
        full, rest = divmod(len(self.lengths), self.batch_size)
        return full + int(rest > 0 and not (self.drop_last and full > 0))
