"""Teachers that are loaded already, and texts with items."""

from __future__ import annotations

import torch
from tiny import ragged_text, tiny_llama

from lit_distill.models import CausalLM
from lit_distill.teachers import FrozenTeacher, Opening, Teacher
from lit_distill.teachers.base import LoadedTeacher
from lit_distill.types import Item, Sequences


class LoadedOnes(Teacher):
    """Gives a model that is loaded already where YAML would name its folder."""

    def __init__(self, teacher: LoadedTeacher, accuracy="exact") -> None:
        self.teacher = teacher
        self.accuracy = accuracy

    def open(self, opening: Opening, key: str) -> int | None:
        return None

    def load(self, vocabulary_size, student) -> LoadedTeacher:
        return self.teacher

    def identity(self, key: str) -> dict:
        return {"path": "x", "revision": None, "layers": [None, None], "content": None}

    @property
    def description(self) -> str:
        return "x"


def frozen(seed: int, hidden: int = 24) -> FrozenTeacher:
    torch.manual_seed(seed)
    return FrozenTeacher(CausalLM(tiny_llama(hidden)))


def routed_text(names: list[str], **fields: str) -> Sequences:
    torch.manual_seed(9)
    text = ragged_text(rows=len(names))
    items = tuple(Item(f"item-{n}", {"teacher": name, **fields}) for n, name in enumerate(names))
    return Sequences(text.input_ids, text.attention_mask, text.target_mask, items=items)
