"""Collates items into tensors: prompts are padded on the left, prompts with responses on the right.

Masks are computed from lengths, never from the padding id, because the padding id may equal EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_distill.types import Batch, Item, Prompts, Sequences


class Example(NamedTuple):
    """One item after truncation, as token ids and text."""

    id: str
    prompt_ids: list[int]
    response_ids: list[int]
    references: list[str]
    prompt_text: str
    targets: list[bool] | None = None
    """Which tokens of prompt and response are learnt; None: the response."""
    fields: dict[str, str] | None = None
    """Fields of the record that the teacher asks for."""


def collate(
    items: Sequence[Example],
    pad_id: int,
    responses: bool,
    corpus: Sequence[Sequence[int]] | None = None,
    prompts: bool = True,
) -> Batch:
    """A batch of the items, in their order.

    A rank without items gets one dummy row without targets and without id, so that it can take part in the step. The row does not
    change any loss or metric.

    Args:
        items: may be empty.
        pad_id: token id used for padding; it may equal EOS or any other id.
        responses: whether the batch contains sequences (prompt and response) besides the prompts.
        corpus: rows of equal length, or None without a corpus.
        prompts: whether the batch contains the left-padded prompts, which generation needs.
    """
    with_references = any(item.references for item in items)
    known = tuple(Item(item.id, item.fields or {}) for item in items)
    return Batch(
        ids=tuple(item.id for item in items),
        prompts=_left_padded([item.prompt_ids for item in items] or [[pad_id]], pad_id) if prompts else None,
        sequences=replace(_sequences(items, pad_id), items=known) if responses else None,
        references=tuple(tuple(item.references) for item in items) if with_references else (),
        prompt_texts=tuple(item.prompt_text for item in items),
        fields=tuple(item.fields for item in known) if any(item.fields for item in known) else (),
        corpus=None if corpus is None else _packed(corpus, pad_id),
    )


def padding_id(tokenizer: Any) -> int:
    """The padding id of the tokenizer, or its EOS id if it has no padding token."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _left_padded(rows: Sequence[list[int]], pad_id: int) -> Prompts:
    width = max(map(len, rows))
    ids = [[pad_id] * (width - len(row)) + row for row in rows]
    columns = torch.arange(width)
    sizes = _sizes(rows)
    return Prompts(
        input_ids=torch.tensor(ids, dtype=torch.int64), attention_mask=(columns >= width - sizes).to(torch.int64)
    )


def _sequences(items: Sequence[Example], pad_id: int) -> Sequences:
    texts = pad_sequences([(item.prompt_ids, item.response_ids) for item in items], pad_id)
    if all(item.targets is None for item in items):
        return texts
    targets = texts.target_mask.clone()
    for row, item in enumerate(items):
        if item.targets is not None:
            targets[row, : len(item.targets)] = torch.tensor(item.targets)
    targets[:, 0] = False  # no token predicts it
    return replace(texts, target_mask=targets)


def pad_sequences(texts: Sequence[tuple[list[int], list[int]]], pad_id: int) -> Sequences:
    """Prompts and responses as sequences ``[B, S]`` padded on the right; the targets are the response tokens.

    Args:
        texts: token ids of each prompt and response. If empty, the result is one row without targets.
        pad_id: token id used for padding; it may equal EOS or any other id.
    """
    rows = [prompt + response for prompt, response in texts or [([pad_id], [pad_id])]]
    prompts = [prompt for prompt, _ in texts] or [[pad_id]]
    width = max(map(len, rows))
    ids = [row + [pad_id] * (width - len(row)) for row in rows]
    columns = torch.arange(width)
    attended = columns < _sizes(rows)
    return Sequences(
        input_ids=torch.tensor(ids, dtype=torch.int64),
        attention_mask=attended.to(torch.int64),
        target_mask=attended & (columns >= _sizes(prompts)) & bool(texts),
    )


def _packed(rows: Sequence[Sequence[int]], pad_id: int) -> Sequences:
    ids = torch.tensor(list(rows) or [[pad_id, pad_id]], dtype=torch.int64)
    targets = torch.full(ids.shape, bool(rows))
    targets[:, 0] = False
    return Sequences(input_ids=ids, attention_mask=torch.ones_like(ids), target_mask=targets)


def _sizes(rows: Sequence[list[int]]) -> Tensor:
    """``[rows, 1]`` number of tokens of each row."""
    return torch.tensor([[len(row)] for row in rows])
