"""From batch indices to batches, in loaders that Lightning leaves as they are and resumes in the middle of an epoch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Dataset

from lit_distill.data.collate import Item, collate
from lit_distill.data.overlong import Limits
from lit_distill.data.sampling import BatchIndices, GlobalBatchSampler
from lit_distill.types import Batch


class BatchDataset(Dataset[Batch]):
    """Whole batches by the indices of their items.

    Args:
        rows: tokenised rows.
        limits: cut what is too long.
        pad_id: fills up.
        responses: whether the rows have any.
        corpus: packed rows, if any.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        limits: Limits,
        pad_id: int,
        responses: bool,
        corpus: datasets.Dataset | None = None,
    ) -> None:
        self.rows = rows
        self.limits = limits
        self.pad_id = pad_id
        self.responses = responses
        self.corpus = corpus

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: BatchIndices) -> Batch:
        corpus = None
        if self.corpus is not None:
            corpus = self.corpus[indices.corpus]["input_ids"] if indices.corpus else []
        return collate(self._items(indices.items), self.pad_id, self.responses, corpus)

    def _items(self, indices: list[int]) -> list[Item]:
        if not indices:
            return []
        columns = self.rows[indices]
        items = []
        for position in range(len(indices)):
            row = {name: values[position] for name, values in columns.items()}
            prompt, response = self.limits.cut(row["prompt_ids"], row["response_ids"], row["kept"])
            items.append(Item(row["id"], prompt, response, row["references"], row["prompt_text"]))
        return items


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader over a `GlobalBatchSampler` that knows how many batches of the epoch it has handed out.

    Lightning keeps this in the checkpoint. Batches that workers have prepared, but nobody has taken, do not count.
    """

    sampler: GlobalBatchSampler
    _taken = (0, 0)  # epoch, batches

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # a generator begins with the first batch that is asked for: Lightning sets the epoch between iter() and next()
        epoch = self.sampler.epoch
        for number, batch in enumerate(super().__iter__(), start=self.sampler.start + 1):
            self._taken = (epoch, number)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands after the batches that were handed out."""
        epoch, batches = self._taken
        return self.state_after(batches if epoch == self.sampler.epoch else self.sampler.start)

    def state_after(self, batches: int) -> dict[str, Any]:
        """The same, if so many of the epoch's batches count as handed out, and ``before`` the last of them."""
        before = self.sampler.state_after(max(batches - 1, self.sampler.start))
        return {**self.sampler.state_after(batches), "before": before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on where that one was."""
        self.sampler.go_on(state)
        self._taken = (self.sampler.epoch, self.sampler.start)


def _apart(_worker: int) -> None:
    """Leave the process group: a signal to the group asks the run to save and end, for which it may need more batches."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def make_loader(
    dataset: BatchDataset, sampler: GlobalBatchSampler, num_workers: int, loader: type[DataLoader[Batch]] = DataLoader
) -> DataLoader[Batch]:
    """One process or several, the same batches in the same order; the global random state is not touched."""
    return loader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(sampler.seed),
        worker_init_fn=_apart,
    )
