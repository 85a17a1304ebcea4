"""Without padding, every text has the hidden states that it has alone: for each architecture, attention and objective."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES

from lit_distill.losses import ObjectiveEvaluator
from lit_distill.models import CausalLM
from lit_distill.models.packing import check_packing
from lit_distill.objectives import ForwardKL, JensenShannon, NextToken, ReverseKL, SkewForwardKL
from lit_distill.teachers import FrozenTeacher
from lit_distill.types import Sequences

CPU = torch.device("cpu")
SIZES = (17, 9, 12, 3, 15, 6)  # together within the context length of the models: old versions of Gemma need that


def texts(left: bool = False, vocabulary: int = 64) -> Sequences:
    width = max(SIZES)
    columns, counts = torch.arange(width), torch.tensor(SIZES)[:, None]
    mask = (columns >= width - counts if left else columns < counts).long()
    ids = torch.randint(3, vocabulary, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    first = (columns == (mask.argmax(dim=1)[:, None])).bool()
    return Sequences(ids, mask, mask.bool() & ~first)


def lm_of(model, packs: str | None = "rows") -> CausalLM:
    lm = CausalLM(model)
    lm.packs = packs
    return lm


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        (name, kind)
        for name in FAMILIES
        for kind in ("eager", "sdpa")
        if name != "opt" and (name, kind) != ("gemma2", "sdpa")
    ],
)
@pytest.mark.parametrize("packs", ["rows", "one row"])
def test_rows_and_gradients_are_those_of_padded_texts(make_model, name: str, attention: str, packs: str) -> None:
    model = make_model(name, attn_implementation=attention)
    lm = lm_of(model)
    check_packing(lm, "student", CPU)
    assert lm.packs == "rows"
    found = []
    for way in (None, packs):
        lm.packs = way
        model.zero_grad()
        rows = lm.target_rows(texts())
        (rows * torch.linspace(-1, 1, rows.numel()).view_as(rows)).sum().backward()
        found.append((rows.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (padded, expected), (packed, gradient) = found
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5 * float(padded.abs().max()))
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "opt"])
def test_a_text_has_the_same_rows_to_the_bit_whatever_its_neighbours_say(make_model, name: str) -> None:
    lm = lm_of(make_model(name))
    one = texts()
    assert one.packed is not None
    assert len(one.packed.input_ids) < len(SIZES)
    other = one.input_ids.clone()
    other[1:] = (other[1:] + 11) % 60 + 3
    rows = lm.target_rows(one)
    changed = lm.target_rows(Sequences(other * one.attention_mask, one.attention_mask, one.target_mask))
    count = SIZES[0] - 1
    assert torch.equal(rows[:count], changed[:count])
    assert not torch.equal(rows[count:], changed[count:])


def test_padding_on_the_left_is_packed_too(make_model) -> None:
    lm = lm_of(make_model("llama"))
    torch.testing.assert_close(lm.target_rows(texts(left=True)), lm_of(lm.model, None).target_rows(texts(left=True)))


@pytest.mark.parametrize("objective", [ForwardKL(), ReverseKL(), JensenShannon(), SkewForwardKL(), NextToken()])
def test_losses_and_gradients_of_objectives_are_those_of_padded_texts(make_model, objective) -> None:
    results = []
    for packs in (None, "rows"):
        student, teacher = (make_model("qwen2", num_layers=n, seed=n) for n in (2, 3))
        evaluator = ObjectiveEvaluator(
            {"one": copy.deepcopy(objective)}, lm_of(student, packs), FrozenTeacher(lm_of(teacher, packs)), "objectives"
        )
        loss, terms = evaluator(texts(), {"one": torch.tensor(1.0 / sum(SIZES))})
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        results.append((loss.detach(), terms["one"].total.detach(), gradients))
    for padded, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6 * float(padded.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rounding_to_16_bits_is_no_mixing(make_model, monkeypatch, name: str) -> None:
    """Rows that other kernels round otherwise, as those of a real model in bfloat16."""
    lm = lm_of(make_model(name).to(torch.bfloat16), None)
    own = CausalLM.forward

    def rounded(self, *arguments, **named):
        hidden = own(self, *arguments, **named)
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(hidden.shape[1]))
        return hidden * (1 + 0.05 * noise.to(hidden))

    monkeypatch.setattr(CausalLM, "forward", rounded)
    check_packing(lm, "teacher", CPU)
    assert lm.packs is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_takes_no_positions_or_lets_texts_see_each_other_is_padded(make_model, monkeypatch, dtype) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_distill.models.packing.rank_zero_info", said.append)
    lm = lm_of(make_model("llama").to(dtype))

    def leaks(self, input_ids, attention_mask, cache=None, position_ids=None):
        hidden = original(self, input_ids, attention_mask, cache, position_ids)
        return hidden if position_ids is None else hidden + hidden.mean(dim=1, keepdim=True)

    original = CausalLM.forward
    with monkeypatch.context() as leaking:
        leaking.setattr(CausalLM, "forward", leaks)
        check_packing(lm, "student", CPU)
    assert lm.packs is None
    assert said == ["model.student: LlamaForCausalLM (sdpa attention) mixes texts of one row, so batches are padded."]
    without_positions = lm_of(make_model("opt"))
    without_positions.takes_positions = False
    check_packing(without_positions, "teacher", CPU)
    assert without_positions.packs is None
