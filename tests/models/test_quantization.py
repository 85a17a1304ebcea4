"""Teachers in few bits: the YAML reaches transformers' own classes, and what they make of a model is listened to as it is."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from lit_distill.losses import ObjectiveEvaluator
from lit_distill.models import CausalLM, LoraSpec, ModelSpec, check_head, load_model, validate_specs
from lit_distill.models.lora import add_lora
from lit_distill.models.quantization import quantization_config
from lit_distill.objectives import ForwardKL
from lit_distill.teachers import FrozenTeacher

KEY = "model.teacher"
INT8 = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture
def folder(tmp_path):
    tiny_llama(hidden=32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def listens(teacher: FrozenTeacher, student: CausalLM, text) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss by ObjectiveEvaluator, and by whole logits in float64."""
    loss, _ = ObjectiveEvaluator({"kd": ForwardKL()}, student, teacher, "model.objectives", chunk_rows=5)(
        text, {"kd": 1.0}
    )
    rows = text.target_mask[:, 1:]
    with torch.no_grad():
        p, q = (lm.head().logits(lm.target_rows(text)).double().log_softmax(-1) for lm in (teacher, student))
    assert p.shape[0] == int(rows.sum())
    return loss, F.kl_div(q, p, reduction="sum", log_target=True)


@needs_torchao
@pytest.mark.parametrize("stored", [False, True], ids=["quantised while it loads", "stored quantised"])
def test_a_teacher_of_8_bits_says_what_its_own_model_says(folder, student, text, stored) -> None:
    spec = ModelSpec(str(folder), quantization=INT8)
    validate_specs(ModelSpec("x"), spec)
    if stored:
        load_model(spec, KEY).save_pretrained(folder.with_name("stored"))
        spec = ModelSpec(str(folder.with_name("stored")))
    model = load_model(spec, KEY)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert type(weight.data) is not torch.Tensor
    own = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].self_attn.q_proj.weight
    error = (weight.dequantize() - own).abs().max()
    assert 0 < error <= own.abs().max() / 127
    teacher = FrozenTeacher(CausalLM(model))
    check_head(teacher.lm, KEY)
    with torch.no_grad():
        said = teacher.head().logits(teacher(text.input_ids, text.attention_mask)[0])
        torch.testing.assert_close(said, model(text.input_ids[:1], attention_mask=text.attention_mask[:1]).logits[0])
    loss, expected = listens(teacher, student, text)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()


@needs_torchao
def test_adapters_learn_over_a_base_of_8_bits_which_can_teach_them(folder, text) -> None:
    model = load_model(ModelSpec(str(folder), quantization=INT8), "model.student")
    add_lora(model, LoraSpec(r=2, target_modules=["q_proj", "down_proj"]), "model.student.lora")
    student = CausalLM(model)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    loss, expected = listens(FrozenTeacher(student, shared=True), student, text)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    assert loss > 0
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_divergence_from_a_teacher_of_16_bits_is_computed_in_float32(folder, student, text, dtype) -> None:
    teacher = FrozenTeacher(CausalLM(load_model(ModelSpec(str(folder), dtype=dtype), KEY)))
    assert teacher.lm.head().weight.dtype == getattr(torch, dtype)
    loss, expected = listens(teacher, student, text)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-5)  # 16 bits would be off by 1e-3


def test_the_mapping_reaches_the_class_of_transformers_with_its_values(folder, monkeypatch) -> None:
    seen = {}

    def record(*args, **kwargs):
        seen.update(kwargs)
        raise RuntimeError("no GPU here")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", record)
    four = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    with pytest.raises(ValueError, match="no GPU here"):
        load_model(ModelSpec(str(folder), quantization=four), KEY)
    given = seen["quantization_config"]
    assert type(given).__name__ == "BitsAndBytesConfig"
    assert (given.load_in_4bit, given.bnb_4bit_quant_type, given.bnb_4bit_compute_dtype) == (
        True,
        "nf4",
        torch.bfloat16,
    )


WRONG = {
    "no such method": (
        {"quant_method": "zip"},
        r"quantization\.quant_method: expected one of .*bitsandbytes.*, got 'zip'",
    ),
    "no method": ({"weights": "int8"}, r"quantization\.quant_method: expected one of .*, got None"),
    "a misspelt argument": (
        {"quant_method": "quanto", "weight": "int8"},
        r"quantization\.weight: QuantoConfig has .* It has weights",
    ),
    "a value that cannot be": ({"quant_method": "quanto", "weights": "int7"}, r"quantization: QuantoConfig: .*int7"),
    "bits that nobody names": (
        {"quant_method": "bitsandbytes"},
        r"quantization: bitsandbytes needs load_in_8bit",
    ),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_wrong_mappings_are_refused_before_anything_is_read(given, message) -> None:
    with pytest.raises(ValueError, match=rf"^teacher\.{message}"):
        validate_specs(ModelSpec("x"), ModelSpec("there is none", quantization=given))


@needs_torchao
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("int8", r"quant_type: expected one of .*Int8WeightOnlyConfig.*, got 'int8'"),
        ({"Int4WeightOnlyConfig": {"size": 3}}, "size"),
    ],
    ids=str,
)
def test_wrong_types_of_torchao_are_refused(kind, message) -> None:
    with pytest.raises(ValueError, match=message):
        quantization_config({"quant_method": "torchao", "quant_type": kind}, f"{KEY}.quantization")


def test_a_missing_package_is_named(monkeypatch, folder) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match=r"^teacher\.quantization: .*torchao is not installed"):
        validate_specs(ModelSpec("x"), ModelSpec(str(folder), quantization=INT8))
    monkeypatch.setattr("transformers.quantizers.quantizer_quanto.is_optimum_quanto_available", lambda: False)
    with pytest.raises(ValueError, match=r"^model\.teacher\.path: .*pip install optimum-quanto"):
        load_model(ModelSpec(str(folder), quantization={"quant_method": "quanto"}), KEY)


def test_what_is_stored_quantised_is_not_quantised_again(folder) -> None:
    import json

    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "quanto", "weights": "int8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^model\.teacher\.quantization: .* is stored quantised already"):
        load_model(ModelSpec(str(folder), quantization={"quant_method": "quanto"}), KEY)


@needs_torchao
def test_a_head_of_few_bits_is_refused(folder) -> None:
    spec = ModelSpec(str(folder), quantization={**INT8, "include_input_output_embeddings": True})
    with pytest.raises(ValueError, match=r"head of LlamaForCausalLM is quantised .*modules_to_not_convert"):
        CausalLM(load_model(spec, KEY)).head()
