"""Adapters of fused experts, which peft wraps one around the other, are merged as they are trained, for every such architecture."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from architectures import VOCABULARY, tiny
from torch import nn
from transformers import AutoModelForCausalLM

from lit_distill.callbacks.folders import save_adapted
from lit_distill.models import CausalLM, LoraSpec, ModelSpec
from lit_distill.models.lora import add_lora
from lit_distill.models.merging import merged_weights
from lit_distill.models.readback import expected_of

KEY = "model.student.lora"
IDS = torch.arange(40).view(4, 10) % VOCABULARY
FUSED = [
    "mixtral",
    "qwen3_moe",
    "qwen3_next",
    "olmoe",
    "glm4_moe",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "afmoe",
    "minimax",
]
OTHERS = ["qwen2_moe", "gpt_oss", "granitemoe"]  # whose experts peft leaves alone


def trained(model: nn.Module) -> nn.Module:
    """With adapters that have learnt something: only where there is a gradient."""
    add_lora(model, LoraSpec(r=2), KEY)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
    return model.eval()


def wrapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__ == "ParamWrapper"]


@pytest.mark.parametrize("kind", [*FUSED, *OTHERS])
@torch.no_grad()
def test_merged_into_a_plain_model_they_compute_the_same(kind: str) -> None:
    base = tiny(kind)
    with torch.enable_grad():
        model = trained(copy.deepcopy(base))
    assert any(name.endswith("experts.base_layer") for name in wrapped(model)) == (kind in FUSED)
    before = {name: p.clone() for name, p in model.named_parameters()}
    merged, plain = merged_weights(model), copy.deepcopy(base)
    plain.load_state_dict(merged)
    logits = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(plain(input_ids=IDS, use_cache=False).logits, logits, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    if kind in FUSED:  # and the experts' share in it is large
        own = {name: weight for name, weight in base.state_dict().items() if "experts" in name}
        plain.load_state_dict({**merged, **own})
        assert (plain(input_ids=IDS, use_cache=False).logits - logits).abs().max() > 0.05


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """There is nothing to write."""


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_they_are_exported_merged_and_alone(tmp_path, kind: str, merge: bool) -> None:
    tiny(kind).save_pretrained(tmp_path / "base")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    spec = ModelSpec(str(tmp_path / "base"), lora=LoraSpec(r=2))
    folder = save_adapted(
        model, spec, Tokenizer(), tmp_path / "x", None, merge=merge, expected=expected_of(CausalLM(model))
    )
    if merge:
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS, use_cache=False).logits
            torch.testing.assert_close(logits, model(input_ids=IDS, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_what_peft_cannot_adapt_is_refused_with_the_key() -> None:
    with pytest.raises(
        ValueError, match=r"^model\.student\.lora: .*lora_dropout.*model\.student\.lora\.target_modules\."
    ):
        add_lora(tiny("mixtral"), LoraSpec(lora_dropout=0.1), KEY)


def test_peft_warns_of_nothing(recwarn) -> None:
    add_lora(tiny("mixtral"), LoraSpec(r=2), KEY)
    assert not [str(warning.message) for warning in recwarn if "pattern" in str(warning.message)]
