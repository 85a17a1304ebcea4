"""Runs whose student has adapters, from the YAML to the exported folder."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from command_line import run, tiny_config, write
from lightning.pytorch import Callback
from peft import PeftModel
from test_resume import METHODS
from transformers import AutoModelForCausalLM

from lit_distill.models import ModelSpec, load_model

LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
SGD = {"class_path": "AdamW", "init_args": {"lr": 0.03, "weight_decay": 0.1}}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def config_of(pair, teacher: dict | None = None, lora: dict | None = None, **model) -> dict:
    config = tiny_config(pair, **{"optimizer": SGD, **model})
    config["model"]["student"]["lora"] = {**LORA, **(lora or {})}
    config["model"]["teacher"] |= teacher or {}
    config["generation"] = {"max_prompts": 0}
    return config


def state(cli) -> dict[str, torch.nn.Parameter]:
    return dict(cli.model.student.model.named_parameters())


def losses(cli) -> list[str]:
    with (Path(cli.trainer.log_dir) / "metrics.csv").open() as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(2, 20)[None]).logits


@pytest.mark.slow
def test_only_adapters_train_and_are_kept_and_the_export_is_a_plain_model(pair, tmp_path) -> None:
    config = write(config_of(pair, lora={"modules_to_save": ["lm_head"]}), tmp_path / "x.yaml")
    done = run("fit", "--config", config)
    base = load_model(ModelSpec(str(pair[0])), "model.student")
    for name, parameter in state(done).items():
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        if not parameter.requires_grad:
            assert torch.equal(parameter, base.get_parameter(plain)), name
        elif "lora_B" in name:
            assert parameter.any(), name
    optimized = {id(p) for group in done.trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in done.model.student.parameters() if p.requires_grad}
    kept = torch.load(done.trainer.checkpoint_callback.last_model_path, weights_only=True)["state_dict"]
    assert kept.keys() == {f"student.model.{name}" for name, p in state(done).items() if p.requires_grad}

    exported = AutoModelForCausalLM.from_pretrained(Path(done.trainer.log_dir) / "export" / "last")
    torch.testing.assert_close(logits(exported), logits(done.model.student.model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(exported), logits(base), atol=1e-3)

    tested = run("test", "--config", config, "--ckpt_path", "last")
    for name, parameter in state(tested).items():
        assert torch.equal(parameter, state(done)[name]), name
    predicted = run("predict", "--config", config, "--ckpt_path", "best")
    best = AutoModelForCausalLM.from_pretrained(Path(done.trainer.log_dir) / "export" / "best")
    torch.testing.assert_close(logits(best), logits(predicted.model.student.model), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own model asks
def test_the_adapter_alone_is_exported_for_peft_by_the_run_and_from_its_checkpoint(pair, tmp_path) -> None:
    config = config_of(pair, lora={"modules_to_save": ["norm"]})
    config["export"] = {"merge_lora": False}
    done = run("fit", "--config", write(config, tmp_path / "x.yaml"))
    from lit_distill.callbacks.export import export_checkpoint

    last = Path(done.trainer.checkpoint_callback.last_model_path)
    for folder in (
        Path(done.trainer.log_dir) / "export" / "last",
        export_checkpoint(last, tmp_path / "adapter", merge_lora=False),
    ):
        assert not (folder / "model.safetensors").exists()
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[0]), folder)
        torch.testing.assert_close(logits(loaded), logits(done.model.student.model), rtol=1e-4, atol=1e-5)
        assert loaded.peft_config["default"].base_model_name_or_path == str(pair[0])
    merged = AutoModelForCausalLM.from_pretrained(export_checkpoint(last, tmp_path / "merged", "float32"))
    torch.testing.assert_close(logits(merged), logits(done.model.student.model), rtol=1e-4, atol=1e-5)


class Stop(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 5:
            raise ConnectionError("the node is gone")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "shared"), [("offline", True), ("minillm", False), ("dpkd", True), ("gkd", False)])
def test_every_method_goes_on_from_a_checkpoint_to_the_same_bits(pair, tmp_path, method, shared) -> None:
    same = {"path": str(pair[0]), "shared_with_student": True}
    config = config_of(pair, same if shared else None, **METHODS[method])
    config["trainer"] |= {"max_steps": 8, "val_check_interval": 1, "limit_val_batches": 1}
    arguments = ["fit", "--config", write(config, tmp_path / "x.yaml"), "--export.enabled", "false"]
    whole = run(*arguments)
    with pytest.raises(ConnectionError, match="the node is gone"):
        run(*arguments, "--trainer.callbacks+", "test_lora_runs.Stop")
    resumed = run(*arguments, "--ckpt_path", "last")
    for name, parameter in state(resumed).items():
        assert torch.equal(parameter, state(whole)[name]), name
    assert losses(resumed) == losses(whole)
    assert any(p.any() for name, p in state(whole).items() if "lora_B" in name)


def test_a_shared_teacher_takes_no_memory_and_a_run_learns_what_a_separate_one_would_have_taught(
    pair, tmp_path
) -> None:
    objectives = {"kd": "ForwardKL", "ce": {"class_path": "NextToken", "init_args": {"weight": 0.5}}}
    runs = []
    for name, shared in (("separate", False), ("shared", True)):
        config = config_of((pair[0], pair[0]), {"shared_with_student": shared}, objectives=objectives)
        runs.append(run("fit", "--config", write(config, tmp_path / f"{name}.yaml"), "--export.enabled", "false"))
    separate, shared = runs
    assert losses(shared) == losses(separate)
    assert {p.data_ptr() for p in shared.model.teacher.lm.parameters()} == {
        p.data_ptr() for p in state(shared).values()
    }
    assert {p.data_ptr() for p in separate.model.teacher.lm.parameters()}.isdisjoint(
        p.data_ptr() for p in state(separate).values()
    )


def test_a_base_stored_in_16_bits_stays_so_and_its_adapters_do_not(pair, tmp_path) -> None:
    folder = tmp_path / "half"
    load_model(ModelSpec(str(pair[0])), "x", torch.bfloat16).save_pretrained(folder)
    config = config_of((folder, pair[1]))
    config["model"]["student"]["tokenizer"] = str(pair[0])
    done = run("fit", "--config", write(config, tmp_path / "x.yaml"))
    assert {p.requires_grad: p.dtype for p in state(done).values()} == {True: torch.float32, False: torch.bfloat16}
    exported = AutoModelForCausalLM.from_pretrained(Path(done.trainer.log_dir) / "export" / "last", dtype="auto")
    assert exported.dtype == torch.bfloat16


@pytest.mark.slow
def test_a_checkpoint_of_other_adapters_or_another_base_is_refused(pair, tmp_path) -> None:
    config = config_of(pair)
    done = run("fit", "--config", write(config, tmp_path / "x.yaml"), "--export.enabled", "false")
    last = done.trainer.checkpoint_callback.last_model_path
    for key, value, message in (
        ("--model.student.lora.r", 4, r"ckpt_path: the checkpoint's student has lora .*'r': 2.*'r': 4"),
        ("--model.student.lora", "null", r"ckpt_path: the checkpoint's student has lora .* model.student.lora is None"),
        ("--model.student.path", pair[1], r"ckpt_path: .* other base weights than those of model.student.path"),
    ):
        with pytest.raises(ValueError, match=message):
            run("test", "--config", tmp_path / "x.yaml", "--ckpt_path", last, key, value)


WRONG = {
    "an export of the adapter that there is not": (
        {"student": {"lora": None}, "export": {"merge_lora": False}},
        r"export\.merge_lora: is false, but the student has no adapter",
    ),
    "an adapter of layers that are in no folder": (
        {"student": {"keep_layers": 1}, "export": {"merge_lora": False}},
        r"export\.merge_lora: is false, but .*keep_layers",
    ),
    "a merge into integers": (
        {"student": {"quantization": {"quant_method": "quanto"}}},
        r"export\.merge_lora: the student's base is quantised",
    ),
    "a misspelt key": ({"student": {"lora": {"rank": 2}}}, r"(?s)model\.student.*rank"),
    "a layer that there is not": (
        {"student": {"lora": {"target_modules": ["qkv"]}}},
        r"model\.student\.lora\.target_modules: the model has no 'qkv'",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused_before_training(pair, tmp_path, change, message, capsys) -> None:
    config = config_of(pair)
    config["model"]["student"] |= change.pop("student", {})
    for key, value in change.items():
        config.setdefault(key, {}).update(value)
    with pytest.raises((ValueError, SystemExit)) as caught:
        run("fit", "--config", write(config, tmp_path / "x.yaml"))
    assert re.search(message, str(caught.value) + capsys.readouterr().err)
