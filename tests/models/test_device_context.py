"""Lightning builds models inside the context of their device: what must be on the processor there, and what must not be.

The meta device stands for a GPU: what is made in its context without a device of its own is on it.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from lit_distill.models import ModelSpec, load_model
from lit_distill.objectives import LossTerm, Objective, probe

KEY = "model.student"


class Look(Objective):
    """Notes where its signals are; its own parameter is where modules are before Lightning moves them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.devices: set[str] = set()

    def forward(self, student_logits, labels, advantages) -> LossTerm:
        self.devices |= {x.device.type for x in (student_logits, labels, advantages)}
        return LossTerm((self.scale * student_logits).sum(), len(labels))


def test_objectives_are_probed_where_they_are() -> None:
    objective = Look()
    with torch.device("meta"):
        probe(objective, 7, "model.objectives.look")
    assert objective.devices == {"cpu"}


@pytest.fixture
def on_a_device(monkeypatch):
    """The context of a device that is not the processor, and that has values as far as anybody asks."""
    own = torch.get_default_device
    named = {"meta": torch.device("cuda", 0)}
    monkeypatch.setattr(torch, "get_default_device", lambda: named.get(own().type, own()))
    with torch.device("meta"):
        yield


def test_random_weights_do_not_depend_on_the_device(pair, request) -> None:
    spec = ModelSpec(str(pair[0]), from_scratch=True)
    torch.manual_seed(3)
    expected = load_model(spec, KEY).get_output_embeddings().weight
    request.getfixturevalue("on_a_device")
    torch.manual_seed(3)
    assert torch.equal(load_model(spec, KEY).get_output_embeddings().weight, expected)


def test_weights_are_read_without_accelerate(pair, monkeypatch, request) -> None:
    """Which transformers asks for in the context of a device."""
    from transformers.integrations import accelerate

    expected = load_model(ModelSpec(str(pair[0])), KEY).get_output_embeddings().weight
    own = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "accelerate" else own(name, *a))
    monkeypatch.setattr(accelerate, "is_accelerate_available", lambda: False)
    request.getfixturevalue("on_a_device")
    assert torch.equal(load_model(ModelSpec(str(pair[0])), KEY).get_output_embeddings().weight, expected)
