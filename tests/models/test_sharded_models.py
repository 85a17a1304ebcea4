"""A model that is cut into shards over two ranks is the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import run_on_ranks
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, tiny_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lit_distill.models import LoraSpec, ModelSpec, load_model
from lit_distill.models.build import ModelBuilder
from lit_distill.models.lora import fingerprint

MODELS = """
import json, os, sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from unittest.mock import patch
from lit_distill.models import CausalLM, LoraSpec, ModelSpec
from lit_distill.teachers import FrozenTeacher
from lit_distill.models.build import ModelBuilder
from lit_distill.distributed import Sharding, gathered
from lit_distill.generation import SamplingParams, generate, decoder as loop, row_uniforms
from lit_distill.types import Prompts
from lightning.fabric.plugins.environments import LightningEnvironment

folder = sys.argv[1]
ADAPTERS = json.loads(sys.argv[2])
torch.distributed.init_process_group("gloo", rank=LightningEnvironment().local_rank(), world_size=2)
rank = torch.distributed.get_rank()
settings = dict(compute_dtype=None, offload_student=False, offload_teacher=False, gather_student=True, gather_teacher=False)
mesh = init_device_mesh("cpu", (2,))
sharding = Sharding(mesh, **settings)
found = {}

def load(spec, dtype=None, frozen=False, sharding=sharding):
    return ModelBuilder(ModelSpec(**spec), "model.student", dtype, sharding).finish(None, frozen=frozen)

ids = torch.arange(10).view(2, 5) + 1
cases = {
    "untied": dict(path=f"{folder}/untied"), "tied": dict(path=f"{folder}/tied"), "in two files": dict(path=f"{folder}/cut"),
    "pruned": dict(path=f"{folder}/untied", keep_layers=[2, 0]), "bare GPT-2": dict(path=f"{folder}/gpt2"),
}
with patch("transformers.PreTrainedModel.from_pretrained", side_effect=AssertionError("a whole model was loaded")):
    for name, spec in cases.items():
        lm = load(spec, torch.float32)
        mine = sum(p.to_local().untyped_storage().nbytes() for p in lm.parameters())
        hidden = lm(ids, torch.ones_like(ids))
        found[name] = {
            "logits": lm.head().logits(hidden.flatten(0, 1)).detach(), "mine": mine,
            "whole": sum(p.numel() * 4 for p in lm.parameters()),
        }
    os.environ["PL_GLOBAL_SEED"] = "5"
    for name, lora in ADAPTERS.items():
        lm = load(dict(path=f"{folder}/untied", lora=LoraSpec(**lora)))
        found[name] = {
            "weights": gathered(dict(lm.model.named_parameters()), keep=True), "base": lm.base_fingerprint,
            "logits": lm.head().logits(lm(ids, torch.ones_like(ids)).flatten(0, 1)).detach(),
            "trained": [n for n, p in lm.model.named_parameters() if p.requires_grad],
        }
    del os.environ["PL_GLOBAL_SEED"]
    half = load(dict(path=f"{folder}/untied"), None, frozen=True)
    found["dtype of a teacher"] = str(next(half.parameters()).dtype), any(p.requires_grad for p in half.parameters())
    offloaded = Sharding(mesh, **{**settings, "offload_student": True})
    lm = load(cases["tied"], torch.float32, sharding=offloaded)
    loss = lm(ids, torch.ones_like(ids)).square().mean()
    loss.backward()
    found["offloaded"] = gathered(lm.model.model.norm.weight.grad, keep=True)

torch.manual_seed(7)
drawn = load(dict(path=f"{folder}/untied", from_scratch=True))
found["from scratch"] = gathered(drawn.model.lm_head.weight, keep=True).detach()

try:
    load(dict(path=f"{folder}/nan"))
except ValueError as error:
    found["nan"] = str(error)

prompts = torch.arange(12).view(4, 3) + 1
share = slice(rank * 2, rank * 2 + 2)  # the rows of rank 1 end earlier
uniforms = row_uniforms(3, [str(row) for row in range(4)], 24)[share]
loop.LOOK_EVERY = {"cpu": 2}
for name, gathers in {"gathered": True, "sharded": False}.items():
    speaker = load(cases["untied"], torch.float32, sharding=Sharding(mesh, **{**settings, "gather_student": gathers}))
    rows = Prompts(prompts[share], torch.ones_like(prompts[share]))
    said = generate(speaker, rows, SamplingParams(24), range(38, 41), uniforms)
    found[name] = said.ids[said.mask], said.logprobs[said.mask]
torch.save(found, f"{folder}/found-{rank}.pt")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models in every way that they may be stored."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(1)
    untied = tiny_llama(num_hidden_layers=3)
    untied.save_pretrained(folder / "untied")
    untied.save_pretrained(folder / "cut", max_shard_size="10KB")
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder / "tied")
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32)).save_pretrained(
        folder / "gpt2"
    )
    weights = load_file(folder / "gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(bare, folder / "gpt2" / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        untied.lm_head.weight[-1, 0] = torch.nan  # in the shard of rank 1
    untied.save_pretrained(folder / "nan")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict]:
    script = folder / "models.py"
    script.write_text(MODELS)
    run_on_ranks(script, 2, folder, json.dumps(ADAPTERS))
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in (0, 1)]


ADAPTERS = {
    "adapters in all layers": {"r": 2},
    "adapters in embeddings and head": {"r": 2, "target_modules": ["embed_tokens", "lm_head"]},
    "adapters and a module that trains whole": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}
SPECS = {
    "untied": {"path": "untied"},
    "tied": {"path": "tied"},
    "in two files": {"path": "untied"},
    "pruned": {"path": "untied", "keep_layers": [2, 0]},
    "bare GPT-2": {"path": "gpt2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_shards_read_from_the_files_make_the_same_model_on_half_the_memory(found, folder, name) -> None:
    spec = SPECS[name]
    whole = load_model(ModelSpec(**{**spec, "path": str(folder / spec["path"])}), "model.student", torch.float32)
    expected = whole(input_ids=torch.arange(10).view(2, 5) + 1).logits.flatten(0, 1)
    for here in found:
        torch.testing.assert_close(here[name]["logits"], expected, rtol=1e-5, atol=1e-6)
        assert here[name]["mine"] < 0.54 * here[name]["whole"]  # a dimension that is odd is padded


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_base_under_adapters_is_read_by_shards_and_draws_what_one_process_draws(
    found, folder, name, monkeypatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    torch.randn(3)  # earlier draws do not matter
    spec = ModelSpec(str(folder / "untied"), lora=LoraSpec(**ADAPTERS[name]))
    whole = ModelBuilder(spec, "model.student", None, None).finish(None)
    weights = dict(whole.model.named_parameters())
    assert any(weight.any() for weight_name, weight in weights.items() if "lora" in weight_name)
    expected = whole.model(input_ids=torch.arange(10).view(2, 5) + 1).logits.flatten(0, 1)
    for here in found:
        assert here[name]["trained"] == [n for n, p in weights.items() if p.requires_grad]
        assert here[name]["base"] == fingerprint(whole)
        assert here[name]["weights"].keys() == weights.keys()
        for weight_name, weight in weights.items():
            assert torch.equal(here[name]["weights"][weight_name], weight), weight_name
        torch.testing.assert_close(here[name]["logits"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_frozen_model_keeps_the_dtype_of_its_files(found) -> None:
    assert all(here["dtype of a teacher"] == ("torch.float32", False) for here in found)


@pytest.mark.slow
def test_random_weights_are_those_that_one_process_draws(found, folder) -> None:
    torch.manual_seed(7)
    drawn = load_model(ModelSpec(str(folder / "untied"), from_scratch=True), "model.student")
    assert all(torch.equal(here["from scratch"], drawn.lm_head.weight) for here in found)


@pytest.mark.slow
def test_gradients_of_an_offloaded_student_are_those_of_a_whole_one(found, folder) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "tied")
    model.model(torch.arange(10).view(2, 5) + 1).last_hidden_state.square().mean().backward()
    torch.testing.assert_close(found[0]["offloaded"], model.model.norm.weight.grad)


@pytest.mark.slow
def test_a_damaged_weight_stops_all_ranks(found) -> None:
    assert all("NaN or infinite weights in lm_head.weight" in here["nan"] for here in found)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gathered", "sharded"])
def test_ranks_that_end_at_different_times_say_what_one_process_says(found, folder, how) -> None:
    from lit_distill.generation import SamplingParams, generate, row_uniforms
    from lit_distill.models import CausalLM
    from lit_distill.types import Prompts

    whole = CausalLM(AutoModelForCausalLM.from_pretrained(folder / "untied"))
    prompts = torch.arange(12).view(4, 3) + 1
    uniforms = row_uniforms(3, [str(row) for row in range(4)], 24)
    said = generate(whole, Prompts(prompts, torch.ones_like(prompts)), SamplingParams(24), range(38, 41), uniforms)
    lengths = said.mask.sum(dim=-1)
    assert lengths[:2].max() > lengths[2:].max() + 4 or lengths[2:].max() > lengths[:2].max() + 4
    for rank, here in enumerate(found):
        rows = slice(rank * 2, rank * 2 + 2)
        assert torch.equal(here[how][0], said.ids[rows][said.mask[rows]])
        torch.testing.assert_close(here[how][1], said.logprobs[rows][said.mask[rows]], rtol=1e-5, atol=1e-6)
