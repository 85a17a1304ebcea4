"""Blocks that two ranks run together are the blocks that one runs, on half the memory; what cannot be shared out is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run_on_ranks
from tiny import VOCABULARY
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from lit_distill.models.spec import build_on_meta
from lit_distill.models.tensor_parallel import apply_tensor_parallel

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "biases everywhere": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "tied, biases of queries": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "norms of queries and keys": Qwen3Config(**SHAPE),
    "fused queries, keys and values": Phi3Config(**SHAPE),
    "norms over all heads": Olmo2Config(**SHAPE),
    "sliding windows and soft caps": Gemma2Config(**SHAPE, query_pre_attn_scalar=8, sliding_window=4),
}
SCRIPT = """
import sys
from pathlib import Path
from unittest.mock import patch
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from torch.distributed.device_mesh import init_device_mesh
from lit_distill.models import ModelSpec
from lit_distill.models.build import ModelBuilder
from lit_distill.distributed import Sharding, gathered, gradient_norm
from lit_distill.generation import SamplingParams, generate, row_uniforms
from lit_distill.types import Prompts

folder = Path(sys.argv[1])
torch.distributed.init_process_group("gloo", rank=LightningEnvironment().local_rank(), world_size=2)
rank = torch.distributed.get_rank()
mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
sharding = Sharding(mesh["data"], None, False, False, True, False, mesh["tensor"], mesh._flatten("world"))
ids = torch.arange(10).view(2, 5) + 1
prompts = Prompts(ids, torch.ones_like(ids))
found = {}
for name in sys.argv[2:]:
    with patch("transformers.PreTrainedModel.from_pretrained", side_effect=AssertionError("a whole model was loaded")):
        lm = ModelBuilder(ModelSpec(str(folder / name)), "model.student", torch.float32, sharding).finish(None)
    hidden = lm(ids, torch.ones_like(ids))
    logits = lm.head().logits(hidden.flatten(0, 1))
    hidden.square().mean().backward()
    said = generate(lm, prompts, SamplingParams(8), [2], row_uniforms(3, ["0", "1"], 8))
    mine = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in (p.to_local() for p in lm.parameters())}
    gradients = {n: p.grad for n, p in lm.model.named_parameters() if p.grad is not None}
    found[name] = {
        "logits": logits, "mine": sum(mine.values()), "said": said.ids, "norm": gradient_norm(gradients.values()),
        "gradients": gathered(gradients, keep=True), "alone": lm.tensor_parallel_group is None,
    }
torch.save(found, folder / f"found-{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # biases and norms too, so that each is felt
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict]:
    script = folder / "models.py"
    script.write_text(SCRIPT)
    run_on_ranks(script, 2, folder, *CONFIGS)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_together_are_one_model_on_half_the_memory(found, folder, name: str) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder / name)
    ids = torch.arange(10).view(2, 5) + 1
    logits = whole(input_ids=ids).logits.flatten(0, 1)
    whole.base_model(ids).last_hidden_state.square().mean().backward()
    gradients = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    for here in found:
        assert not here[name]["alone"]
        torch.testing.assert_close(here[name]["logits"], logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(here[name]["norm"], norm, rtol=1e-4, atol=0)
        assert here[name]["gradients"].keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(here[name]["gradients"][parameter], gradient, rtol=1e-4, atol=1e-5)
        # norms inside of blocks are whole on both ranks, and an odd vocabulary is padded
        assert here[name]["mine"] < 0.56 * sum(p.numel() * 4 for p in whole.parameters())
    assert torch.equal(found[0][name]["said"], found[1][name]["said"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_together_say_what_one_says(found, folder, name: str) -> None:
    from lit_distill.generation import SamplingParams, generate, row_uniforms
    from lit_distill.models import CausalLM
    from lit_distill.types import Prompts

    ids = torch.arange(10).view(2, 5) + 1
    whole = CausalLM(AutoModelForCausalLM.from_pretrained(folder / name))
    said = generate(whole, Prompts(ids, torch.ones_like(ids)), SamplingParams(8), [2], row_uniforms(3, ["0", "1"], 8))
    assert torch.equal(found[0][name]["said"], said.ids)


@pytest.mark.parametrize(
    ("config", "size", "said"),
    [
        (GPT2Config(n_embd=16, n_layer=1, n_head=2), 2, "GPT2LMHeadModel has no tensor-parallel plan"),
        (LlamaConfig(**SHAPE), 4, "num_key_value_heads is 2, which 4 ranks cannot split"),
        (LlamaConfig(**SHAPE | {"intermediate_size": 25}), 2, "layers.0.mlp.gate_proj has 25 outputs, which 2 ranks"),
        (
            MixtralConfig(**SHAPE, num_local_experts=2),
            2,
            "unsupported style 'moe_tp_experts' for layers.0.mlp.experts",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_refused(config, size: int, said: str) -> None:
    mesh = SimpleNamespace(size=lambda: size)
    with pytest.raises(ValueError, match=f"^model.teacher.path: .*{said}.*tensor_parallel_size: 1") as error:
        apply_tensor_parallel(build_on_meta(config), mesh, "model.teacher")
    assert "trainer.strategy.init_args" in str(error.value)
