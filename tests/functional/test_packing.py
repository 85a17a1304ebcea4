"""Packed rows hold every token once, at its place; they leave little padding and are not much longer than the longest text."""

from __future__ import annotations

import pytest
import torch

from lit_distill.functional import assign_rows, pack_rows


def padded(sizes: list[int], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(sizes)
    columns = torch.arange(width)
    counts = torch.tensor(sizes)[:, None]
    mask = (columns >= width - counts if left else columns < counts).long()
    ids = torch.arange(1, len(sizes) * width + 1).view(len(sizes), width)
    return ids * mask, mask


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("one_row", [False, True])
def test_every_token_is_at_its_place_and_counts_from_the_start_of_its_text(left: bool, one_row: bool) -> None:
    sizes = [4, 2, 2, 7, 1]
    ids, mask = padded(sizes, left)
    packed = pack_rows(ids, mask, one_row)
    assert packed is not None
    assert packed.input_ids.shape == ((1, 16) if one_row else (2, 8))
    attended = mask.bool()
    assert torch.equal(packed.input_ids.flatten()[packed.places[attended]], ids[attended])
    assert sorted(packed.places[attended].tolist()) == list(range(16))
    assert packed.position_ids.flatten()[packed.places[attended]].tolist() == [i for size in sizes for i in range(size)]


def test_padding_at_the_end_of_a_row_is_a_text_of_its_own() -> None:
    ids, mask = padded([5, 3, 4, 2, 1, 1])
    packed = pack_rows(ids, mask)
    assert packed is not None
    rows = zip(packed.input_ids.tolist(), packed.position_ids.tolist(), strict=True)
    ends = [[position for token, position in zip(*row, strict=True) if token == 0] for row in rows]
    assert all(end == list(range(len(end))) for end in ends)


@pytest.mark.parametrize("sizes", [[3, 3, 3], [1], [0, 0]])
def test_a_batch_without_padding_or_without_tokens_stays_as_it_is(sizes: list[int]) -> None:
    ids, mask = padded([*sizes, *([1] if not any(sizes) else [])])
    mask[len(sizes) :] = 0
    assert pack_rows(ids, mask) is None


@pytest.mark.parametrize(("count", "share"), [(16, 0.05), (32, 0.025), (64, 0.02)])
def test_lengths_of_real_texts_leave_little_padding(count: int, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        draws = torch.randn(count, generator=generator).mul(0.7).add(4.85).exp()
        sizes = [int(size) for size in draws.clamp(32, 512)]
        rows = assign_rows(sizes)
        assert sorted(text for row in rows for text in row) == list(range(count))
        width = max(sum(sizes[text] for text in row) for row in rows)
        assert width <= 2 * max(sizes)
        assert len(rows) * width <= (1 + share) * sum(sizes)
