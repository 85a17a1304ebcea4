"""Datasets and loaders of whole batches; Lightning does not replace their sampler and can resume them inside an epoch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Dataset

from lit_distill.data.collate import Example, collate
from lit_distill.data.length_limits import LengthLimits
from lit_distill.data.sampler import BatchIndices, GlobalBatchSampler
from lit_distill.types import Batch


class BatchDataset(Dataset[Batch]):
    """Maps the indices of a batch to the collated batch.

    Args:
        rows: tokenised rows.
        limits: truncate prompts and responses that are too long.
        pad_id: token id used for padding.
        responses: whether the rows have responses.
        corpus: packed rows of plain text, if any.
        prompts: whether batches contain the left-padded prompts, which generation needs.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        limits: LengthLimits,
        pad_id: int,
        responses: bool,
        corpus: datasets.Dataset | None = None,
        prompts: bool = True,
    ) -> None:
        self.rows = rows
        self.limits = limits
        self.pad_id = pad_id
        self.responses = responses
        self.corpus = corpus
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits that identify the tokens of all rows, in their order, and which of them are learnt."""
        code = hashlib.sha256()
        columns = ["prompt_ids", "response_ids", "targets"]
        for part in self.rows.select_columns(columns).with_format("arrow").iter(10_000):
            for name in columns:
                values = part[name].combine_chunks()
                for numbers in (values.value_lengths(), values.flatten()):
                    code.update(numbers.to_numpy().tobytes())
        return code.hexdigest()[:32]

    def __getitem__(self, indices: BatchIndices) -> Batch:
        corpus = None
        if self.corpus is not None:
            corpus = self.corpus[indices.corpus]["input_ids"] if indices.corpus else []
        return collate(self._items(indices.items), self.pad_id, self.responses, corpus, self.prompts)

    def _items(self, indices: list[int]) -> list[Example]:
        if not indices:
            return []
        columns = self.rows[indices]
        items = []
        for position in range(len(indices)):
            row = {name: values[position] for name, values in columns.items()}
            prompt, response, kept = row["prompt_ids"], row["response_ids"], row["num_prefix_tokens"]
            targets = None
            if row["targets"]:
                learnt = _mask(row["targets"], len(prompt) + len(response))
                before, after = self.limits.cut(learnt[: len(prompt)], learnt[len(prompt) :], kept)
                targets = before + after
            prompt, response = self.limits.cut(prompt, response, kept)
            known = json.loads(row["fields"]) if row["fields"] else None
            items.append(Example(row["id"], prompt, response, row["references"], row["prompt_text"], targets, known))
        return items


def _mask(spans: list[int], size: int) -> list[bool]:
    """``size`` values, true inside the spans, which are given as begin and end in turn."""
    mask = [False] * size
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        mask[start:end] = [True] * (end - start)
    return mask


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader over a `GlobalBatchSampler` that counts the batches of the epoch that it has returned.

    Lightning saves this count in the checkpoint. Batches that workers have prefetched but not
    returned yet do not count.
    """

    sampler: GlobalBatchSampler
    _taken = (0, 0)  # epoch, batches

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # this runs only at the first next(), as in every generator: Lightning sets the epoch between iter() and next()
        epoch = self.sampler.epoch
        for number, batch in enumerate(super().__iter__(), start=self.sampler.start + 1):
            self._taken = (epoch, number)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch after the batches returned so far."""
        epoch, batches = self._taken
        return self.state_after(batches if epoch == self.sampler.epoch else self.sampler.start)

    def state_after(self, batches: int) -> dict[str, Any]:
        """The position after ``batches`` batches of the epoch; the key ``before`` holds the position one batch earlier."""
        before = self.sampler.state_after(max(batches - 1, self.sampler.start))
        return {**self.sampler.state_after(batches), "before": before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next iteration at the saved position."""
        self.sampler.go_on(state)
        self._taken = (self.sampler.epoch, self.sampler.start)


def _leave_process_group(_worker: int) -> None:
    """Leave the process group, so that a stop signal to the group does not end the workers.

    After the signal the run saves and ends, and it may need more batches until then.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def make_loader(
    dataset: BatchDataset, sampler: GlobalBatchSampler, num_workers: int, loader: type[DataLoader[Batch]] = DataLoader
) -> DataLoader[Batch]:
    """A loader that returns the same batches in the same order for any ``num_workers``; the global random state is unchanged."""
    return loader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(sampler.seed),
        worker_init_fn=_leave_process_group,
    )
