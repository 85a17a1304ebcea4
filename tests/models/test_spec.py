"""Loading: from a folder and a GGUF file, on the meta device, and every way in which files can be wrong."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, T5Config

from lit_distill.models import ModelSpec, load_model, load_tokenizer
from lit_distill.models import location as source
from lit_distill.models.dropout import disable_dropout
from lit_distill.models.spec import build_on_meta, load_config

KEY = "model.student"


@pytest.fixture
def folder(make_model, make_tokenizer, tmp_path) -> Path:
    """A saved Llama of four layers with its tokenizer."""
    make_model("llama").save_pretrained(tmp_path / "llama")
    make_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def rewrite_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def test_a_saved_model_loads_with_its_own_weights_in_evaluation_mode(family, make_model, ids, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    loaded = load_model(ModelSpec(str(tmp_path)), KEY)
    assert not loaded.training
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_checkpoint_in_several_files_loads_whole(make_model, ids, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    torch.testing.assert_close(load_model(ModelSpec(str(tmp_path)), KEY)(ids).logits, model(ids).logits)


def test_the_role_decides_the_dtype_unless_the_spec_does(make_model, tmp_path):
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    spec = ModelSpec(str(tmp_path))
    assert load_model(spec, KEY).dtype == torch.bfloat16
    assert load_model(spec, KEY, torch.float32).dtype == torch.float32
    spec.dtype = "float16"
    assert load_model(spec, KEY, torch.float32).dtype == torch.float16


def test_keep_layers_and_drop_layers_prune_the_loaded_model(folder, ids):
    kept = load_model(ModelSpec(str(folder), keep_layers=2), KEY)
    dropped = load_model(ModelSpec(str(folder), drop_layers=[1, 2]), KEY)
    assert kept.config.num_hidden_layers == 2
    assert torch.equal(kept(ids).logits, dropped(ids).logits)
    with pytest.raises(ValueError, match=r"model\.student\.keep_layers: 9, but the model has 4 layers"):
        load_model(ModelSpec(str(folder), keep_layers=9), KEY)


def test_a_model_that_has_lost_layers_loses_more_only_with_a_warning(folder, tmp_path):
    load_model(ModelSpec(str(folder), drop_layers=[1]), KEY).save_pretrained(tmp_path)
    load_model(ModelSpec(str(tmp_path)), KEY)  # which is no reason to warn
    load_model(ModelSpec(str(tmp_path), keep_layers=3), KEY)  # nor is this
    with pytest.warns(
        UserWarning, match=rf"{KEY}\.drop_layers: .* has 3 of 4, and now keeps 2\. .* set {KEY}\.drop_layers"
    ):
        twice = load_model(ModelSpec(str(tmp_path), drop_layers=[1]), KEY)
    twice.save_pretrained(tmp_path / "twice")
    with pytest.warns(UserWarning, match=rf"{KEY}\.keep_layers: .* has 2 of 4"):
        load_model(ModelSpec(str(tmp_path / "twice"), keep_layers=1), KEY)


def test_from_scratch_draws_weights_from_the_global_seed(folder):
    (folder / "model.safetensors").unlink()
    spec, drawn = ModelSpec(str(folder), from_scratch=True), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(load_model(spec, KEY).lm_head.weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_on_the_meta_device_a_model_has_its_shapes_and_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with torch.device("meta"):
        model = load_model(ModelSpec(str(folder), keep_layers=[0, 2]), KEY, torch.bfloat16)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert (model.dtype, model.config.num_hidden_layers) == (torch.bfloat16, 2)


def test_a_model_far_too_large_for_this_machine_builds_on_meta():
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    assert sum(parameter.numel() for parameter in build_on_meta(config).parameters()) > 60e9


def test_the_attention_implementation_reaches_the_layers(folder):
    model = load_model(ModelSpec(str(folder), attn_implementation="eager"), KEY)
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"model\.student[\s\S]*magic"):
        load_model(ModelSpec(str(folder), attn_implementation="magic"), KEY)


def test_gradient_checkpointing_changes_no_gradient(folder, ids):
    gradients, recomputed = [], []
    for checkpointing in (False, True):
        model = load_model(ModelSpec(str(folder), gradient_checkpointing=checkpointing), KEY).train()
        calls = []
        model.model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(ids, use_cache=False).logits.square().sum().backward()
        gradients.append(model.model.embed_tokens.weight.grad)
        recomputed.append(len(calls))
    assert recomputed == [1, 2]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("gpt2", {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}),
        ("llama", {"attention_dropout": 0.5}),
        ("opt", {"attention_dropout": 0.5, "dropout": 0.5, "layerdrop": 0.5}),
    ],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_without_dropout_training_and_evaluation_compute_the_same(family, dropout, attention, make_model, ids):
    model = make_model(family, attn_implementation=attention, **dropout)
    expected = model(ids).logits
    assert not torch.allclose(model.train()(ids).logits, expected)
    disable_dropout(model)
    torch.testing.assert_close(model.train()(ids).logits, expected)
    assert all(getattr(model.config, name) == 0.0 for name in dropout)


def test_a_tokenizer_comes_with_the_model_or_from_elsewhere(folder, make_tokenizer, tmp_path):
    assert len(load_tokenizer(ModelSpec(str(folder)), KEY)) == 64
    make_tokenizer(["<unk>", "<s>", "</s>", "a"]).save_pretrained(tmp_path / "other")
    assert len(load_tokenizer(ModelSpec(str(folder), tokenizer=str(tmp_path / "other")), KEY)) == 4


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_folder_without_a_tokenizer_is_an_error_that_names_the_key(family, make_model, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.student\.path: .*"):
        load_tokenizer(ModelSpec(str(tmp_path)), KEY)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "nowhere/model.gguf", "a/b/c"])
def test_a_path_that_does_not_exist_is_an_error_that_names_the_key(path):
    with pytest.raises(ValueError, match=r"model\.student\.path: .*nowhere.* does not exist|a/b/c does not exist"):
        load_config(ModelSpec(path), KEY)


def test_a_hub_model_out_of_reach_says_what_to_do_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"model\.student\.path: 'nobody/nothing' is not a local folder[\s\S]*HF_HUB_OFFLINE"
    ):
        load_model(ModelSpec("nobody/nothing"), KEY)


def test_a_broken_tokenizer_file_is_an_error_that_names_the_key(folder):
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}')
    with pytest.raises(ValueError, match=r"model\.student\.path: .* could not be loaded"):
        load_tokenizer(ModelSpec(str(folder)), KEY)


def remove(name):
    return lambda folder: (folder / name).unlink()


def pickle_instead(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter_instead(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def gguf_instead(folder):
    (folder / "config.json").rename(folder / "model.gguf")


def cut_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


def lose_shard(folder):
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")


def break_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{")


def lose_weight(folder):
    rewrite_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def reshape_weight(folder):
    rewrite_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))


def poison(value):
    def change(folder):
        rewrite_weights(folder, lambda weights: weights["model.layers.2.mlp.up_proj.weight"][3, 4].fill_(value))

    return change


def edit_config(**entries):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **entries}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), r"has no config\.json\. Give a folder"),
        (adapter_instead, r"has no config\.json, only an adapter\. Merge it"),
        (gguf_instead, r"has no config\.json, but GGUF files: model\.gguf"),
        (remove("model.safetensors"), r"has no model\.safetensors\. Give a folder"),
        (pickle_instead, r"has no model\.safetensors, only pytorch_model\.bin: a pickle.*use_safetensors=False"),
        (cut_weights, r"could not be loaded\. SafetensorError"),
        (lose_shard, r"lacks 1 of 2 weight files: model-2\.safetensors"),
        (break_index, r"model\.safetensors\.index\.json is not an index"),
        (lose_weight, r"lacks weights, which would be initialised randomly: model\.layers\.1\.mlp\.up_proj\.weight\."),
        (reshape_weight, r"shapes contradict config\.json: model\.norm\.weight \(stored \(7,\), config \(32,\)\)"),
        (poison(float("nan")), r"NaN or infinite weights in model\.layers\.2\.mlp\.up_proj\.weight\."),
        (poison(float("-inf")), r"NaN or infinite weights in model\.layers\.2\.mlp\.up_proj\.weight\."),
        (edit_config(hidden_size="wide"), r"could not be loaded\. StrictDataclass.*hidden_size"),
        (edit_config(model_type="sphinx"), r"could not be loaded\. ValueError: .*sphinx"),
        (
            edit_config(model_type="sphinx", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.LM"}),
            "could not be loaded.*trust_remote_code",
        ),
    ],
)
def test_damaged_files_are_errors_that_name_the_key_and_the_damage(damage, message, folder):
    damage(folder)
    with pytest.raises(ValueError, match=rf"(?s)model\.student\.path: .*{message}"):
        load_model(ModelSpec(str(folder)), KEY)


def test_weights_that_the_model_does_not_use_are_a_warning(folder, caplog):
    rewrite_weights(folder, lambda weights: weights.update({"value_head.weight": torch.ones(3)}))
    with caplog.at_level(logging.WARNING, logger="lit_distill"):
        load_model(ModelSpec(str(folder)), KEY)
    assert "has weights that the model does not use: value_head.weight" in caplog.text


@pytest.mark.parametrize(
    ("config_class", "kind"), [(T5Config, "an encoder-decoder"), (BertConfig, "a masked language")]
)
def test_a_model_that_is_not_causal_is_refused(config_class, kind, tmp_path):
    config_class().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"model\.student\.path: .* is {kind}.*Give a causal, decoder-only"):
        load_config(ModelSpec(str(tmp_path)), KEY)


NAMES = {
    "embed_tokens": "token_embd",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "norm": "output_norm",
    "lm_head": "output",
}


@pytest.fixture
def gguf_file(make_model, tmp_path) -> tuple[Path, torch.nn.Module]:
    """A tiny Llama as a GGUF file of float32 weights, and the model it was written from."""
    model = make_model("llama", num_layers=2)
    config, path = model.config, tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "<unk>", *(chr(33 + index) for index in range(60)), "!!"])
    writer.add_token_types([3, 3, 3] + [1] * 61)
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, stored in model.state_dict().items():
        *_, part, _ = name.split(".")
        layer = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        heads = {"q_proj": 4, "k_proj": 2}.get(part)
        # GGUF stores the two halves of a rotary head interleaved
        weight = stored.unflatten(0, (heads, 2, -1)).swapaxes(1, 2).flatten(0, 2) if heads else stored
        writer.add_tensor(f"{layer}{NAMES[part]}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


@torch.no_grad()
def test_a_gguf_file_loads_trains_and_saves_like_any_other_model(gguf_file, ids, tmp_path):
    path, model = gguf_file
    loaded = load_model(ModelSpec(str(path)), KEY)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    assert loaded.generation_config.eos_token_id == 1


def test_a_gguf_file_may_be_named_inside_its_folder_and_brings_its_tokenizer(gguf_file):
    path, _ = gguf_file
    spec = ModelSpec(str(path.parent), gguf_file=path.name, keep_layers=[1])
    assert load_model(spec, KEY).config.num_hidden_layers == 1
    assert load_tokenizer(spec, KEY).convert_ids_to_tokens([1, 63]) == ["</s>", "!!"]


def test_a_missing_gguf_package_names_the_extra(gguf_file, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(ValueError, match=r"model\.student\.path: .* needs the package\(s\) gguf.*lit-distill\[gguf\]"):
        load_config(ModelSpec(str(gguf_file[0])), KEY)
