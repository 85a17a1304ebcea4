"""Padding-free batches: padded texts put one after the other into fewer rows, and the places where their tokens went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.functional.host import to_device

ENOUGH = 0.02
"""A share of padding that no further row length is tried for."""
LONGEST = 2
"""Rows are at most so many times as long as the longest text: without a kernel for documents, attention costs their square."""


class PackedRows(NamedTuple):
    """Texts in rows. A model that keeps the texts of a row apart by their positions gives each the hidden states it has alone."""

    input_ids: Tensor
    """[R, C] int64."""
    position_ids: Tensor
    """[R, C] int64: begins at 0 with each text, and with the padding at the end of a row."""
    places: Tensor
    """[B, S] int64 on the CPU: index in [R · C] of every token of the padded batch; that of its text's end for padding."""


def pack_rows(input_ids: Tensor, attention_mask: Tensor, one_row: bool = False) -> PackedRows | None:
    """Put the texts of a padded batch into fewer or shorter rows; None if they would need as much room as now.

    Args:
        input_ids: ``[B, S]`` int64.
        attention_mask: ``[B, S]``: 1 for the tokens of a text, which are contiguous; 0 for padding on either side. If it is on the
            CPU, nothing waits for the device of ``input_ids``.
        one_row: put all texts into one row, for attention kernels that know documents there only.

    Example:
        Texts of 4, 2 and 2 tokens, ``[3, 4]`` with padding, become two rows of 4 without: the first alone, the others together.
    """
    attended = attention_mask.cpu() != 0
    sizes = attended.sum(dim=1).tolist()
    if not any(sizes):
        return None
    rows = [list(range(len(sizes)))] if one_row else assign_rows(sizes)
    width = max(sum(sizes[text] for text in row) for row in rows)
    if len(rows) * width >= input_ids.numel():
        return None
    starts = [0] * len(sizes)
    filled = []
    for number, row in enumerate(rows):
        at = 0
        for text in row:
            starts[text] = number * width + at
            at += sizes[text]
        filled.append(at)
    positions = (attended.cumsum(dim=1) - 1).clamp(min=0)
    places = torch.tensor(starts)[:, None] + positions
    used = places[attended]
    sources = torch.full((len(rows) * width,), input_ids.numel())  # of the padding: the zero that is appended below
    sources[used] = attended.flatten().nonzero()[:, 0]
    position_ids = (torch.arange(width) - torch.tensor(filled)[:, None]).flatten()  # of the padding at the end
    position_ids[used] = positions[attended]
    both = to_device(torch.stack([sources, position_ids]), input_ids.device)
    packed = F.pad(input_ids.flatten(), (0, 1))[both[0]]
    return PackedRows(packed.view(-1, width), both[1].view(-1, width), places)


def assign_rows(sizes: Sequence[int]) -> list[list[int]]:
    """The texts of each row: as many rows as leave little padding, and no row much longer than the longest text.

    For each number of rows the width is found by bisection (MULTIFIT, Coffman, Garey and Johnson 1978).

    Args:
        sizes: number of tokens of each text.
    """
    order = sorted(range(len(sizes)), key=lambda text: -sizes[text])
    longest, total = max(sizes), sum(sizes)
    best: list[list[int]] = [[text] for text in range(len(sizes))]
    least = len(sizes) * longest - total
    for count in range(min(len(sizes), -(-total // max(longest, 1))), 0, -1):
        narrow, wide = max(longest, -(-total // count)), LONGEST * longest
        while narrow < wide:
            width = (narrow + wide) // 2
            if _fill(order, sizes, width, count) is None:
                narrow = width + 1
            else:
                wide = width
        rows = _fill(order, sizes, wide, count)
        if rows is None:
            break
        if count * wide - total < least:
            best, least = rows, count * wide - total
        if least <= ENOUGH * total:
            break
    return best


def _fill(order: Sequence[int], sizes: Sequence[int], width: int, count: int) -> list[list[int]] | None:
    """Put each text, the longest first, into the fullest row that has room for it; None if ``count`` rows are too few."""
    rows: list[list[int]] = [[] for _ in range(count)]
    room = [width] * count
    for text in order:
        fitting = [row for row in range(count) if room[row] >= sizes[text]]
        if not fitting:
            return None
        row = min(fitting, key=room.__getitem__)
        rows[row].append(text)
        room[row] -= sizes[text]
    return rows
