"""Body and head together are the model: for every family, its own logits, loss and gradients, tied, biased, capped or scaled."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
)
from transformers.cache_utils import DynamicCache

from lit_distill.functional import forward_kl
from lit_distill.losses import ObjectiveEvaluator
from lit_distill.models import CausalLM, ModelSpec, check_head, load_model
from lit_distill.objectives import ForwardKL, NextToken
from lit_distill.teachers import FrozenTeacher
from lit_distill.types import Sequences

V = 53
SMALL = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "tied GPT-2": GPT2Config(vocab_size=V, n_embd=16, n_head=2, n_layer=2, n_positions=64),
    "untied Llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "tied Qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "OPT with projections": OPTConfig(
        vocab_size=V, hidden_size=16, word_embed_proj_dim=8, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2
    ),
    "soft-capped Gemma 2": Gemma2Config(**SMALL, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0),
    "scaled Cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "divided Granite": GraniteConfig(**SMALL, logits_scaling=4.0),
    "biased Phi": PhiConfig(**SMALL),
}


def model_of(name: str, seed: int = 0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # of transformers since 5.24, and before
def test_the_cache_is_handed_over_under_the_name_that_the_body_takes(name: str) -> None:
    given = {}
    model = model_of("untied Llama")
    body = {
        "cache": lambda input_ids, attention_mask, use_cache, cache=None, **_: given.update(cache=cache),
        "past_key_values": lambda input_ids, attention_mask, use_cache, past_key_values=None, **_: given.update(
            cache=past_key_values
        ),
    }[name]
    inner = model.base_model

    def forward(**arguments):
        body(**arguments)
        return inner.__class__.forward(inner, input_ids=arguments["input_ids"], use_cache=False)

    forward.__signature__ = inspect.signature(body)
    inner.forward = forward
    ids, cache = torch.arange(4)[None], DynamicCache(config=model.config)
    CausalLM(model)(ids, torch.ones_like(ids), cache)
    assert given["cache"] is cache


@pytest.fixture
def text() -> Sequences:
    ids = torch.randint(3, V, (3, 10))
    attention = torch.ones_like(ids)
    attention[1, 7:] = 0
    targets = attention.bool()
    targets[:, :4] = False
    return Sequences(ids, attention, targets)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_loss_and_gradients_are_those_of_the_models_own_logits(name: str, chunk_rows: int, text: Sequences) -> None:
    model, teacher = model_of(name), model_of("untied Llama", seed=9)
    check_head(CausalLM(model), "model.student")
    inputs = {"input_ids": text.input_ids, "attention_mask": text.attention_mask}
    rows, labels = text.target_mask[:, 1:], text.input_ids[text.target_mask]
    logits = model(**inputs).logits[:, :-1][rows].float()
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits[:, :-1][rows].float()
    expected = 0.3 * forward_kl(logits, teacher_logits).sum() + 0.2 * F.cross_entropy(logits, labels, reduction="sum")
    expected.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    objectives = {"kd": ForwardKL(), "ce": NextToken()}
    measure = ObjectiveEvaluator(objectives, CausalLM(model), FrozenTeacher(CausalLM(teacher)), "k", chunk_rows)
    loss, _ = measure(text, {"kd": 0.3, "ce": 0.2})
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for key, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(key).grad, gradient, rtol=1e-4, atol=1e-5)


def test_padded_heads_of_different_sizes_are_cut_to_the_common_vocabulary(text: Sequences) -> None:
    student, teacher = model_of("tied Qwen2"), model_of("untied Llama", seed=9)
    student.resize_token_embeddings(V + 11)
    teacher.resize_token_embeddings(V + 3)
    pair = CausalLM(student, V), FrozenTeacher(CausalLM(teacher, V))
    _, terms = ObjectiveEvaluator({"kd": ForwardKL()}, *pair, "k")(text, {"kd": 1.0})
    rows = text.target_mask[:, 1:]
    with torch.no_grad():
        q, p = (
            m(input_ids=text.input_ids, attention_mask=text.attention_mask).logits[:, :-1][rows][:, :V]
            for m in (student, teacher)
        )
    torch.testing.assert_close(terms["kd"].total, forward_kl(q, p).sum(), rtol=1e-5, atol=1e-5)


def test_a_model_that_does_more_to_its_logits_is_refused() -> None:
    model = model_of("untied Llama")
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, logits: logits.flip(-1))
    with pytest.raises(ValueError, match=r"model\.student\.path: .* changes its logits"):
        check_head(CausalLM(model), "model.student")


def test_gradient_checkpointing_changes_no_gradient_and_does_not_hinder_decoding(tmp_path, text: Sequences) -> None:
    from lit_distill.generation import SamplingParams, generate
    from lit_distill.types import Prompts

    model_of("untied Llama").save_pretrained(tmp_path)
    gradients, said = [], []
    for checkpointing in (False, True):
        lm = CausalLM(load_model(ModelSpec(str(tmp_path), gradient_checkpointing=checkpointing), "model.student"))
        lm.train()
        ObjectiveEvaluator({"ce": NextToken()}, lm, None, "k")(text, {"ce": 1.0})[0].backward()
        gradients.append([p.grad for p in lm.parameters()])
        prompts = Prompts(text.input_ids[:1, :4], text.attention_mask[:1, :4])
        said.append(generate(lm, prompts, SamplingParams(8, temperature=0.0), ()).ids)
        assert lm.model.training
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)
    assert torch.equal(*said)


def test_the_body_is_compiled_where_that_is_asked_for(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: asked.append((type(self).__name__, options))
    )
    CausalLM(model_of("untied Llama"), compile_body=True)
    assert asked == [("LlamaModel", {"dynamic": True})]
