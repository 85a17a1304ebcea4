"""Pruned decoders, compared with unpruned ones whose dropped layers pass their input through."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig
from transformers.cache_utils import DynamicCache

from lit_distill.models import CausalLM
from lit_distill.models.pruning import keep_layers, resolve_layers


def decoder_layers(model):
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def pass_input_through(layer):
    def hook(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    layer.register_forward_hook(hook, with_kwargs=True)


@torch.no_grad()
def test_a_pruned_model_computes_what_the_kept_layers_compute_one_after_the_other(family, make_model, ids):
    kept = [0, 2, 5]
    model = make_model(family, num_layers=6)
    bypassed = copy.deepcopy(model)
    for index, layer in enumerate(decoder_layers(bypassed)):
        if index not in kept:
            pass_input_through(layer)
    whole = model(ids).logits
    keep_layers(model, kept)
    torch.testing.assert_close(model(ids).logits, bypassed(ids, use_cache=False).logits)
    assert not torch.allclose(model(ids).logits, whole, atol=1e-2)


@torch.no_grad()
def test_a_pruned_model_decodes_with_its_cache_what_it_computes_without(family, make_model, ids):
    model = make_model(family, num_layers=5)
    keep_layers(model, [1, 2, 4])
    lm, mask, cache = CausalLM(model), torch.ones_like(ids), DynamicCache(config=model.config)
    rows = [lm(ids[:, step : step + 1], mask[:, : step + 1], cache) for step in range(ids.shape[1])]
    assert cache.get_seq_length() == ids.shape[1]
    torch.testing.assert_close(torch.cat(rows, dim=1), lm(ids, mask), rtol=1e-4, atol=1e-4)
    generated = [model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*generated)


@torch.no_grad()
def test_a_pruned_model_is_the_same_after_saving_and_loading(family, make_model, ids, tmp_path):
    model = make_model(family, num_layers=5)
    keep_layers(model, [0, 3, 4])
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]
    assert again.config.num_hidden_layers == len(decoder_layers(again)) == 3
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_the_kinds_of_attention_follow_their_layers(make_model):
    model = make_model("gemma2", num_layers=4)
    before = list(model.config.layer_types)
    keep_layers(model, [1, 3])
    assert model.config.layer_types == [before[1], before[3]] == ["full_attention"] * 2


def test_a_list_of_stop_tokens_as_long_as_the_model_is_deep_stays_whole(make_model):
    model = make_model("llama", num_layers=3, eos_token_id=[2, 5, 9])
    keep_layers(model, [0, 1])
    assert model.config.eos_token_id == [2, 5, 9]


def test_an_architecture_whose_layers_depend_on_their_number_is_refused():
    config = Qwen2MoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
        mlp_only_layers=[1],  # a plain MLP there, experts elsewhere
        bos_token_id=1,
        eos_token_id=2,
    )
    keep_layers(AutoModelForCausalLM.from_config(config), [0, 1, 3])
    with pytest.raises(ValueError, match=r"cannot be pruned to layers \[1, 2\] with keep_layers or drop_layers"):
        keep_layers(AutoModelForCausalLM.from_config(config), [1, 2])


def test_a_model_without_a_list_of_layers_is_refused(make_model):
    model = make_model("llama")
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(ValueError, match="has no list of 4 decoder layers"):
        keep_layers(model, [0])


def test_pruning_draws_no_random_numbers(make_model):
    model = make_model("opt")
    before = torch.get_rng_state()
    keep_layers(model, [0, 1])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_count_is_spread_evenly_from_the_first_layer_to_the_last():
    assert resolve_layers(30, 1, None, "model.student") == [0]
    for total in range(2, 40):
        for count in range(2, total + 1):
            layers = resolve_layers(total, count, None, "model.student")
            gaps = np.diff(layers)
            assert (layers[0], layers[-1], len(layers)) == (0, total - 1, count)
            assert gaps.min() >= 1
            assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("keep", "drop", "layers"),
    [
        (None, None, None),
        ([0, 3, 5], None, [0, 3, 5]),
        ([0, -1], None, [0, 5]),
        (None, [1, -2], [0, 2, 3, 5]),
        (None, [], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_layers_are_named_by_keeping_or_by_dropping(keep, drop, layers):
    assert resolve_layers(6, keep, drop, "model.student") == layers


@pytest.mark.parametrize(
    ("keep", "drop", "message"),
    [
        ([0, 6], None, r"model\.student\.keep_layers has \[6\], but the model has 6 layers: 0 to 5"),
        (None, [-7], r"model\.student\.drop_layers has \[-7\], but the model has 6 layers"),
        (0, None, r"model\.student\.keep_layers: 0, .* give 1 to 6"),
        (7, None, r"model\.student\.keep_layers: 7, .* give 1 to 6"),
        ([], None, r"model\.student\.keep_layers: is an empty list"),
        ([1, 2, -5], None, r"model\.student\.keep_layers is \[1, 2, -5\], which names layer\(s\) \[1\] of 6 twice"),
        (None, [0, 1, 2, 3, 4, 5], r"model\.student\.drop_layers names all 6 layers"),
        ([0], [1], r"model\.student\.keep_layers: is given, and drop_layers too"),
    ],
)
def test_impossible_layers_are_an_error_that_names_the_key(keep, drop, message):
    with pytest.raises(ValueError, match=message):
        resolve_layers(6, keep, drop, "model.student")
