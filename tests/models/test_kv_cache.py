"""The cache with buffers gives what the cache of transformers gives, and copies no earlier token."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig
from transformers.cache_utils import DynamicLayer

from lit_distill.models.kv_cache import BufferedLayer, new_cache


def states(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, columns, 4), torch.randn(rows, 2, columns, 3)


@pytest.mark.parametrize("columns", [1, 7, 64])
def test_keys_and_values_equal_those_of_the_cache_of_transformers(columns: int) -> None:
    ours, theirs = BufferedLayer(columns), DynamicLayer()
    for rows, new, kept in ((4, 5, None), (4, 1, None), (4, 1, [3, 1]), (2, 1, None), (2, 2, [0]), (1, 1, None)):
        keys, values = states(rows, new)
        for found, expected in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(found, expected)
        if kept is not None:
            ours.reorder_cache(torch.tensor(kept))
            theirs.reorder_cache(torch.tensor(kept))
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_a_new_token_leaves_the_earlier_ones_where_they_are() -> None:
    layer = BufferedLayer(10)
    places = {tuple(part.data_ptr() for part in layer.update(*states(2, width))) for width in (6, 1, 1, 2)}
    assert len(places) == 1
    layer.update(*states(2, 1))  # the eleventh
    assert layer.keys.shape[-2] == 11


def test_rows_can_be_chosen_before_anything_is_cached() -> None:
    layer = BufferedLayer(4)
    layer.reorder_cache(torch.tensor([0]))
    assert layer.get_seq_length() == 0


def test_only_layers_that_keep_everything_are_replaced() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    assert [type(layer) for layer in new_cache(LlamaConfig(**sizes), 5).layers] == [BufferedLayer, BufferedLayer]
    sliding = [isinstance(layer, BufferedLayer) for layer in new_cache(Gemma2Config(**sizes), 5).layers]
    assert sliding == [False, True]
