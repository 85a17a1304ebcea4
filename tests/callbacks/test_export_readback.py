"""An export that is not the trained student is found when it is written, whatever the reason, and nothing is lost by it."""

from __future__ import annotations

import importlib.util
import json
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from command_line import run, tiny_config, write
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_distill.callbacks.export import export_checkpoint
from lit_distill.callbacks.folders import save_adapted, save_folder
from lit_distill.models import CausalLM, LoraSpec, ModelSpec, load_model
from lit_distill.models.lora import add_lora
from lit_distill.models.readback import WrongExportError, check_folder, expected_of

EMBEDDINGS = "model.embed_tokens.weight"
NORM = "model.norm.weight"


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """There is nothing to write."""


@contextmanager
def writing_another(name: str, which: int = 1):
    """Let the ``which``-th model that is saved have another weight ``name`` than it is told to have."""
    right, calls = PreTrainedModel.save_pretrained, []

    def wrong(model, folder, state_dict, **settings):
        calls.append(folder)
        if len(calls) == which:
            state_dict = {**state_dict, name: state_dict[name] * 1.5}
        return right(model, folder, state_dict=state_dict, **settings)

    with patch.object(PreTrainedModel, "save_pretrained", wrong):
        yield


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_rounding_is_no_difference(family, make_model, tmp_path, dtype) -> None:
    model = make_model(family)
    expected = expected_of(CausalLM(model))
    folder = save_folder(model, dict(model.state_dict()), Tokenizer(), tmp_path / "x", dtype, expected)
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == getattr(torch, dtype or "float32")


def change(name: str):
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        weights = load_file(file)
        weights[name][-1] += 1e-3
        save_file(weights, file, metadata={"format": "pt"})

    return apply


def lose(name: str, under: str | None = None):
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        weights = load_file(file)
        lost = weights.pop(name)
        save_file({**weights, **({under: lost} if under else {})}, file, metadata={"format": "pt"})

    return apply


def configure(**settings):
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return apply


DAMAGES = {
    "a weight of a token that no prompt has": (change(EMBEDDINGS), rf"differ from the trained ones: {EMBEDDINGS}\."),
    "a weight that is not there": (lose(NORM), rf"trained ones: {NORM}; .* unused or missing: {NORM}\."),
    "a name that nothing reads": (lose(NORM, "model.other"), r"unused or missing: model\.norm\.weight, model\.other"),
    "a config that ties": (
        lambda folder: (lose("lm_head.weight")(folder), configure(tie_word_embeddings=True)(folder)),
        r"its logits are off by .*%.*differ from the trained ones: lm_head\.weight\.",
    ),
    "a config with another base of positions": (
        configure(rope_parameters={"rope_theta": 3.0, "rope_type": "default"}),
        "its logits are off by .*no weight differs, so its config",
    ),
    "a config of another shape": (configure(intermediate_size=31), "the export cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_difference_is_named(tmp_path, damage, message) -> None:
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    expected, weights = expected_of(CausalLM(model)), dict(model.state_dict())
    check_folder(tmp_path, weights, expected, trust_remote_code=False)
    damage(tmp_path)
    with pytest.raises(WrongExportError, match=message):
        check_folder(tmp_path, weights, expected, trust_remote_code=False)


def test_numbers_too_large_for_the_dtype_are_found(tmp_path) -> None:
    model = tiny_llama()
    model.model.embed_tokens.weight.data[3] = 1e5
    expected = expected_of(CausalLM(model))
    with pytest.raises(WrongExportError, match="its logits are off"):
        save_folder(model, dict(model.state_dict()), Tokenizer(), tmp_path / "x", "float16", expected)


def test_a_wrong_folder_takes_no_ones_place(tmp_path) -> None:
    model, folder = tiny_llama(), tmp_path / "x"
    expected = expected_of(CausalLM(model))
    save_folder(model, dict(model.state_dict()), Tokenizer(), folder, None, expected)
    with (
        writing_another(NORM),
        pytest.raises(WrongExportError, match=r"trained ones: model\.norm.*written files are in .*x\.wrong"),
    ):
        save_folder(model, dict(model.state_dict()), Tokenizer(), folder, None, expected)
    assert {path.name for path in tmp_path.iterdir()} == {"x", "x.wrong"}
    check_folder(folder, dict(model.state_dict()), expected, trust_remote_code=False)


def doubled(weights, file, **settings) -> None:
    save_file({name: weight * 2 for name, weight in weights.items()}, file, **settings)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_adapter_is_read_back_by_peft(tmp_path, dtype) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    spec = ModelSpec(str(tmp_path / "base"), lora=LoraSpec(r=2, modules_to_save=["lm_head"]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    add_lora(model, spec.lora, "model.student.lora")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    expected = expected_of(CausalLM(model))
    save_adapted(model, spec, Tokenizer(), tmp_path / "adapter", dtype, merge=False, expected=expected)

    with (
        patch("safetensors.torch.save_file", doubled),
        pytest.raises(WrongExportError, match=r"trained ones: base_model\.model\..*\.weight"),
    ):
        save_adapted(model, spec, Tokenizer(), tmp_path / "other", dtype, merge=False, expected=expected)
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_an_adapter_over_a_quantised_base_is_compared_as_it_is_in_its_file(tmp_path) -> None:
    tiny_llama(hidden=32).save_pretrained(tmp_path / "base")
    bits = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}
    spec = ModelSpec(str(tmp_path / "base"), quantization=bits, lora=LoraSpec(r=2, target_modules=["q_proj"]))
    model = load_model(spec, "model.student")
    add_lora(model, spec.lora, "model.student.lora")
    expected = expected_of(CausalLM(model))
    save_adapted(model, spec, Tokenizer(), tmp_path / "adapter", None, merge=False, expected=expected)
    with (
        patch("safetensors.torch.save_file", doubled),
        pytest.raises(WrongExportError, match=r"trained ones: base_model"),
    ):
        save_adapted(model, spec, Tokenizer(), tmp_path / "other", None, merge=False, expected=expected)


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    """A run whose last student is written wrongly."""
    folder = tmp_path_factory.mktemp("fit")
    config = tiny_config(pair)
    config["trainer"] |= {"default_root_dir": str(folder), "max_steps": 2}
    with writing_another(NORM), pytest.raises(ValueError, match="export/last: ") as failure:
        run("fit", "--config", write(config, folder / "x.yaml"))
    return next(folder.glob("**/version_0")), str(failure.value)


def test_a_run_that_writes_one_folder_wrongly_writes_the_other_and_keeps_its_checkpoints(finished) -> None:
    folder, said = finished
    assert f"differ from the trained ones: {NORM}." in said
    assert "export/best" not in said
    assert {path.name for path in (folder / "export").iterdir()} == {"last.wrong", "best"}
    assert (folder / "checkpoints" / "last.ckpt").exists()


def test_the_tool_says_it_too_unless_it_is_told_not_to_look(finished, tmp_path, capsys) -> None:
    path = Path(__file__).parents[2] / "tools" / "export_student.py"
    spec = importlib.util.spec_from_file_location("export_student", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    arguments = [str(finished[0] / "checkpoints" / "last.ckpt"), str(tmp_path / "x")]
    with writing_another(NORM), pytest.raises(SystemExit, match=rf"error: .*trained ones: {NORM}\..*--no-verify"):
        tool.main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["x.wrong"]
    with writing_another(NORM):
        tool.main([*arguments, "--no-verify"])
    assert (tmp_path / "x" / "model.safetensors").exists()


def test_a_student_that_needs_a_gpu_is_compared_by_its_weights(finished, tmp_path, monkeypatch, caplog) -> None:
    def fail(*_arguments, **_settings) -> None:
        raise NotImplementedError("this kernel has no backend for cpu")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaModel.forward", fail)
    checkpoint = finished[0] / "checkpoints" / "last.ckpt"
    export_checkpoint(checkpoint, tmp_path / "x")
    assert "does not run on a CPU (this kernel" in caplog.text
    with writing_another(NORM), pytest.raises(WrongExportError, match=NORM):
        export_checkpoint(checkpoint, tmp_path / "y")
