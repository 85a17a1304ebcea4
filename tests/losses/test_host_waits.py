"""A step asks nothing of its device: on the meta device, whose tensors have no values, whatever reads one raises an error."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tiny import tiny_llama

from lit_distill.data.collate import pad_sequences
from lit_distill.losses import ObjectiveEvaluator
from lit_distill.models import CausalLM
from lit_distill.objectives import DirectPreference, ForwardKL, NextToken, Objective, TokenPreference
from lit_distill.teachers import FrozenTeacher
from lit_distill.types import Pairs, Sequences

META = torch.device("meta")


@pytest.fixture(autouse=True)
def _own_waits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without autocast, which the meta device lacks, and without the questions that transformers asks about masks."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr("transformers.masking_utils._ignore_causal_mask_sdpa", lambda *_, **__: False)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", torch.zeros_like)


def texts(*sizes: int) -> Sequences:
    return pad_sequences([([5, 6], [7] * size) for size in sizes], pad_id=0)


def loss_on(objectives: dict[str, Objective], text: Sequences | Pairs, packs: str | None) -> torch.Tensor:
    models = [CausalLM(tiny_llama().to(META)) for _ in range(2)]
    for lm in models:
        lm.packs = packs
    evaluator = ObjectiveEvaluator(objectives, models[0], FrozenTeacher(models[1]), "objectives")
    part = text.slice(0, 3)
    counts = evaluator.counts([part], objectives)
    assert all(count.device == META for count in counts.values())
    loss, _ = evaluator(part, dict.fromkeys(objectives, 1.0))
    loss.backward()
    assert models[0].model.lm_head.weight.grad.shape == models[0].model.lm_head.weight.shape
    return loss


@pytest.mark.parametrize("packs", [None, "rows", "one row"])
def test_a_step_on_texts_reads_nothing_from_the_device(packs: str | None) -> None:
    loss_on({"kd": ForwardKL(), "ce": NextToken()}, texts(3, 1, 9, 4).to(META), packs)


@pytest.mark.parametrize("objective", [DirectPreference(), TokenPreference()], ids=["texts", "tokens"])
def test_a_step_on_pairs_reads_nothing_from_the_device(objective: Objective) -> None:
    loss_on({"preference": objective}, Pairs(texts(3, 1, 9).to(META), texts(2, 2, 7).to(META)), "rows")


def test_texts_in_another_order_stay_known() -> None:
    text = texts(3, 1, 9, 4).to(META).select(torch.tensor([2, 0])).slice(1, 2)
    assert text.target_index.shape == (3,)
    assert text.without_targets().target_index.shape == (0,)


def test_a_mask_that_changes_is_read_again() -> None:
    text = texts(3, 1).to("cpu")
    assert len(text.target_index) == 4
    text.target_mask[0] = False
    assert len(text.target_index) == 1
    assert len(text.slice(0, 2).target_index) == 1


def test_the_first_token_of_a_text_is_no_target() -> None:
    text = texts(3, 1)
    text.target_mask[1, 0] = True
    with pytest.raises(ValueError, match="target_mask: the first token"):
        _ = text.target_index
