"""Validates the specs of student and teacher, alone and together, and resolves their dtypes for a device; reads no files."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.models.lora import check_lora
from lit_distill.models.precision import auto_dtype, emulated
from lit_distill.models.quantization import quantization_config
from lit_distill.models.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lit_distill.models.causal_lm import CausalLM

INDEPENDENT_FIELDS = (
    "lora",
    "shared_with_student",
    "gradient_checkpointing",
    "compile",
    "attn_implementation",
    "trust_remote_code",
)
"""Fields that may differ between a student and a teacher with ``shared_with_student``; ``lora`` is set only for the student."""


def validate_specs(student: ModelSpec, teacher: ModelSpec | None, key: str = "teacher") -> None:
    """Check the specs of student and teacher, alone and together; reads no files.

    Args:
        student: spec under ``model.student``.
        teacher: spec of the teacher, or of a part of it.
        key: the teacher's YAML key below ``model``.

    Raises:
        ValueError: naming the key, what was given and what to do.
    """
    _check_spec(student, "student")
    if student.lora is not None:
        check_lora(student.lora, "student.lora")
    elif student.quantization is not None:
        raise ValueError(
            "student.quantization: quantised weights cannot be trained. Train adapters, model.student.lora: {r: 8}, "
            "or remove model.student.quantization."
        )
    if student.shared_with_student:
        raise ValueError(
            "student.shared_with_student: is an option of the teacher. Set model.teacher.shared_with_student instead."
        )
    if teacher is None:
        return
    _check_spec(teacher, key)
    if teacher.lora is not None:
        raise ValueError(
            f"{key}.lora: the teacher is not trained. To use a trained adapter, merge it into its base (peft: "
            f"`merge_and_unload`) and set model.{key}.path to the result."
        )
    if teacher.shared_with_student:
        _check_shared(student, teacher, key)


def _check_spec(spec: ModelSpec, key: str) -> None:
    for name in ("lora", "quantization"):
        if getattr(spec, name) is not None and spec.from_scratch:
            raise ValueError(
                f"{key}.from_scratch: random weights cannot be combined with {key}.{name}. Remove one of the two."
            )
    if spec.cuda_graphs and key not in ("student", "teacher"):
        raise ValueError(f"{key}.cuda_graphs: only student and teacher generate. Remove it.")
    if spec.cuda_graphs and spec.attn_implementation not in (None, "sdpa"):
        raise ValueError(
            f"{key}.cuda_graphs: needs sdpa attention, but model.{key}.attn_implementation is {spec.attn_implementation}. Set it "
            "to sdpa, or remove one of the two."
        )
    if spec.quantization is not None:
        if spec.gguf_file is not None or spec.path.endswith(".gguf"):
            raise ValueError(
                f"{key}.quantization: a GGUF file is dequantised. Remove it, or set {key}.path to safetensors files."
            )
        quantization_config(spec.quantization, f"{key}.quantization")


def _check_shared(student: ModelSpec, teacher: ModelSpec, key: str) -> None:
    if student.lora is None:
        raise ValueError(
            f"{key}.shared_with_student: is true, but all weights of the student are trained, so it has no frozen base. Set "
            f"model.student.lora, or remove model.{key}.shared_with_student."
        )
    for field in fields(ModelSpec):
        name, default = field.name, field.default
        given, own = getattr(teacher, name), getattr(student, name)
        unset = given == default and name not in ("keep_layers", "drop_layers")
        if name not in INDEPENDENT_FIELDS and given != own and not unset:
            raise ValueError(
                f"{key}.{name}: with shared_with_student the teacher is the student's base, so expected {own!r}, not "
                f"{given!r}. Set the same value as for model.student, or remove model.{key}.shared_with_student."
            )


def check_graphs(specs: Mapping[str, ModelSpec], device_type: str, sharded: bool) -> None:
    """Refuse ``cuda_graphs`` on other devices, and of models that are sharded.

    Args:
        specs: the models of the run, by their YAML key below ``model``.
        device_type: where they run.
        sharded: whether the strategy shards them over the ranks.

    Raises:
        ValueError: naming the key, what was given and what to do.
    """
    for key in (key for key, spec in specs.items() if spec.cuda_graphs):
        if device_type != "cuda":
            raise ValueError(f"{key}.cuda_graphs: needs a CUDA device, but this run is on {device_type}. Remove it.")
        if sharded:
            raise ValueError(
                f"{key}.cuda_graphs: needs whole models on each device, but trainer.strategy shards them. Set trainer.strategy: "
                "ddp, or remove it."
            )


def device_and_precision(module: Any) -> tuple[str, str | None]:
    """Device type and precision of a LightningModule's Trainer; without a Trainer, the device type of its weights and None."""
    trainer = module._trainer
    return (trainer.strategy.root_device.type, str(trainer.precision)) if trainer else (module.device.type, None)


def resolve_dtype(spec: ModelSpec, key: str, device_type: str, trained: bool = False) -> ModelSpec:
    """The spec with ``dtype: auto`` resolved for a device type, which is logged; trained weights become float32."""
    if spec.dtype != "auto":
        return spec
    dtype = "float32" if trained else str(auto_dtype(device_type)).removeprefix("torch.")
    rank_zero_info(f"model.{key}.dtype: auto is {dtype} on this {device_type}.")
    return replace(spec, dtype=dtype)  # type: ignore[arg-type]


def warn_of_emulation(lm: CausalLM, key: str, device_type: str, precision: str | None = None) -> None:
    """Log each dtype in the config that the device only emulates, with the key to change.

    Args:
        lm: a model.
        key: its YAML key below ``model``.
        device_type: where it runs.
        precision: ``trainer.precision``, if it is to be checked too.
    """
    requested = {f"model.{key}.dtype": lm.model.dtype}
    if precision == "bf16-mixed":
        requested["trainer.precision"] = torch.bfloat16
    for name, dtype in requested.items():
        if message := emulated(name, dtype, device_type):
            rank_zero_info(message)
