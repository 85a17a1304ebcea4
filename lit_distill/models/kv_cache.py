"""The key-value cache of generation: buffers of the final size, so that a new token copies no earlier one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class BufferedLayer(DynamicLayer):
    """Keys and values of one attention layer at the beginning of a buffer.

    `DynamicLayer` concatenates at every token, which copies all earlier ones.

    Args:
        columns: tokens that the buffers hold; they grow if there are more.
    """

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.key_buffer: Tensor | None = None
        """[B, heads, >= columns, D]; ``keys`` is a view of its first columns."""
        self.value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write ``[B, heads, S, D]`` behind the cached columns; returns views of all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        self.key_buffer, self.keys = self._written(self.key_buffer, length, key_states)
        self.value_buffer, self.values = self._written(self.value_buffer, length, value_states)
        return self.keys, self.values

    def _written(self, buffer: Tensor | None, length: int, states: Tensor) -> tuple[Tensor, Tensor]:
        total = length + states.shape[-2]
        if buffer is None or total > buffer.shape[-2]:
            larger = states.new_empty(*states.shape[:2], max(self.columns, total), states.shape[-1])
            if buffer is not None:
                larger[..., :length, :] = buffer[..., :length, :]
            buffer = larger
        buffer[..., length:total, :] = states
        return buffer, buffer[..., :total, :]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows ``beam_idx`` of the batch, in this order."""
        if self.key_buffer is None or self.value_buffer is None:
            return
        length = self.get_seq_length()
        self.key_buffer = self._rows(self.key_buffer, length, beam_idx)
        self.value_buffer = self._rows(self.value_buffer, length, beam_idx)
        self.set_length(length)

    def set_length(self, length: int) -> None:
        """Take the first ``length`` columns of the buffers as written."""
        assert self.key_buffer is not None
        assert self.value_buffer is not None
        self.keys, self.values = self.key_buffer[..., :length, :], self.value_buffer[..., :length, :]

    def clear_tail(self) -> None:
        """Set the columns that are not written to 0, so that attention may read them under a mask."""
        for buffer in (self.key_buffer, self.value_buffer):
            assert buffer is not None
            buffer[..., self.get_seq_length() :, :] = 0

    @staticmethod
    def _rows(buffer: Tensor, length: int, rows: Tensor) -> Tensor:
        kept = buffer.new_empty(len(rows), *buffer.shape[1:])
        torch.index_select(buffer[..., :length, :], 0, rows.to(buffer.device), out=kept[..., :length, :])
        return kept


class FixedLayer(DynamicLayer):
    """The buffers of a `BufferedLayer` for a pass in which no size depends on how much of them is written.

    Args:
        layer: its buffers are read and written.
        columns: ``[S]`` where the S new tokens are written.
        read: how many columns attention reads.
    """

    def __init__(self, layer: BufferedLayer, columns: Tensor, read: int) -> None:
        super().__init__()
        assert layer.key_buffer is not None
        assert layer.value_buffer is not None
        self.columns = columns
        self.keys: Tensor = layer.key_buffer[..., :read, :]
        self.values: Tensor = layer.value_buffer[..., :read, :]
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write ``[B, heads, S, D]`` at the columns; returns ``[B, heads, read, D]``."""
        self.keys.index_copy_(-2, self.columns, key_states)
        self.values.index_copy_(-2, self.columns, value_states)
        return self.keys, self.values


def new_cache(config: PreTrainedConfig, columns: int) -> Cache:
    """An empty cache for texts of ``columns`` tokens.

    Layers that keep everything get a `BufferedLayer`; sliding windows and recurrent states stay as transformers makes them.
    """
    cache = DynamicCache(config=config)
    cache.layers = [BufferedLayer(columns) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
