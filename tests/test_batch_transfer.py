"""Batches on their way to a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lit_distill.types import Sequences, TensorRecord


@dataclass(frozen=True)
class Moves(TensorRecord):
    """Notes how its part is moved."""

    part: Tensor


class Part(Tensor):
    """Stands for a tensor; on a machine without a GPU it stays where it is."""

    moves: ClassVar[list[tuple[str, bool]]] = []

    def to(self, device, non_blocking: bool = False) -> Part:
        self.moves.append((torch.device(device).type, non_blocking))
        return self


def test_a_copy_to_a_gpu_is_not_waited_for_and_one_to_the_processor_is() -> None:
    record = Moves(torch.ones(2).as_subclass(Part))
    move_data_to_device(record, torch.device("cuda", 0))  # as Lightning moves a batch
    move_data_to_device(record, torch.device("cpu"))
    assert Part.moves == [("cuda", True), ("cpu", False)]


def test_rows_without_any_token_keep_one_column() -> None:
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
    text = Sequences(ids, mask, mask.bool())
    assert text.slice(0, 2).input_ids.tolist() == [[2, 3], [8, 9]]
    assert text.slice(1, 2).input_ids.tolist() == [[6]]
