"""Items become tensors: prompts padded on the left, prompt and response on the right; masks come from lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_distill.types import Batch, Prompts, Sequences


class Item(NamedTuple):
    """One item within the limits, as ids and text."""

    id: str
    prompt_ids: list[int]
    response_ids: list[int]
    references: list[str]
    prompt_text: str


def collate(
    items: Sequence[Item], pad_id: int, responses: bool, corpus: Sequence[Sequence[int]] | None = None
) -> Batch:
    """A batch of the items, in their order.

    A rank without items gets one row that counts nowhere: it has no target and no id, but takes part in the step.

    Args:
        items: may be empty.
        pad_id: fills up; it may equal EOS or any other id.
        responses: whether there are sequences besides the prompts.
        corpus: rows of one length, or None without a corpus.
    """
    prompts = [item.prompt_ids for item in items] or [[pad_id]]
    answers = [item.response_ids for item in items] or [[pad_id]]
    with_references = bool(items) and all(item.references for item in items)
    return Batch(
        ids=tuple(item.id for item in items),
        prompts=_left_padded(prompts, pad_id),
        sequences=_right_padded(prompts, answers, pad_id, counts=bool(items)) if responses else None,
        references=tuple(tuple(item.references) for item in items) if with_references else (),
        prompt_texts=tuple(item.prompt_text for item in items),
        corpus=None if corpus is None else _packed(corpus, pad_id),
    )


def padding_id(tokenizer: Any) -> int:
    """The tokenizer's padding id, or EOS where it has none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _left_padded(rows: Sequence[list[int]], pad_id: int) -> Prompts:
    width = max(map(len, rows))
    ids = [[pad_id] * (width - len(row)) + row for row in rows]
    columns = torch.arange(width)
    sizes = _sizes(rows)
    return Prompts(
        input_ids=torch.tensor(ids, dtype=torch.int64), attention_mask=(columns >= width - sizes).to(torch.int64)
    )


def _right_padded(prompts: Sequence[list[int]], answers: Sequence[list[int]], pad_id: int, counts: bool) -> Sequences:
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    ids = [row + [pad_id] * (width - len(row)) for row in rows]
    columns = torch.arange(width)
    attended = columns < _sizes(rows)
    return Sequences(
        input_ids=torch.tensor(ids, dtype=torch.int64),
        attention_mask=attended.to(torch.int64),
        target_mask=attended & (columns >= _sizes(prompts)) & counts,
    )


def _packed(rows: Sequence[Sequence[int]], pad_id: int) -> Sequences:
    ids = torch.tensor(list(rows) or [[pad_id, pad_id]], dtype=torch.int64)
    targets = torch.full(ids.shape, bool(rows))
    targets[:, 0] = False
    return Sequences(input_ids=ids, attention_mask=torch.ones_like(ids), target_mask=targets)


def _sizes(rows: Sequence[list[int]]) -> Tensor:
    """[rows, 1]."""
    return torch.tensor([[len(row)] for row in rows])
