"""What student and teacher may ask for in their specs, alone and together, and what it means on a device; nothing is read here."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.models.lora import check_lora
from lit_distill.models.precision import auto_dtype, emulated
from lit_distill.models.quantized import quantization_config
from lit_distill.models.spec import ModelSpec

if TYPE_CHECKING:
    from lit_distill.models.causal_lm import CausalLM

SHARED_BY_NATURE = (
    "lora",
    "shared_with_student",
    "gradient_checkpointing",
    "compile",
    "attn_implementation",
    "trust_remote_code",
)
"""What a teacher that is the student's base need not repeat; ``lora`` is the student's alone."""


def check_specs(student: ModelSpec, teacher: ModelSpec | None) -> None:
    """Look at what student and teacher ask for together; nothing is read.

    Raises:
        ValueError: naming the key, what was given and what to do.
    """
    _check_spec(student, "model.student")
    if student.lora is not None:
        check_lora(student.lora, "model.student.lora")
    elif student.quantization is not None:
        raise ValueError(
            "model.student.quantization: weights in few bits cannot train. Train adapters over them, model.student.lora: {r: 8}, "
            "or remove it."
        )
    if student.shared_with_student:
        raise ValueError(
            "model.student.shared_with_student: is for the teacher. Set model.teacher.shared_with_student."
        )
    if teacher is None:
        return
    _check_spec(teacher, "model.teacher")
    if teacher.lora is not None:
        raise ValueError(
            "model.teacher.lora: the teacher learns nothing. For an adapter that was trained before, merge it into its base (peft: "
            "`merge_and_unload`) and give the result as model.teacher.path."
        )
    if teacher.shared_with_student:
        _check_shared(student, teacher)


def _check_spec(spec: ModelSpec, key: str) -> None:
    for name in ("lora", "quantization"):
        if getattr(spec, name) is not None and spec.from_scratch:
            raise ValueError(f"{key}.from_scratch: random weights are no base for {key}.{name}. Remove one of them.")
    if spec.quantization is not None:
        if spec.gguf_file is not None or spec.path.endswith(".gguf"):
            raise ValueError(f"{key}.quantization: a GGUF file is dequantised. Give {key}.path of safetensors weights.")
        quantization_config(spec.quantization, f"{key}.quantization")


def _check_shared(student: ModelSpec, teacher: ModelSpec) -> None:
    if student.lora is None:
        raise ValueError(
            "model.teacher.shared_with_student: is true, but all weights of the student train, so it has no base that stays. Set "
            "model.student.lora, or remove it."
        )
    for field in fields(ModelSpec):
        name, default = field.name, field.default
        given, own = getattr(teacher, name), getattr(student, name)
        needless = given == default and name not in ("keep_layers", "drop_layers")
        if name not in SHARED_BY_NATURE and given != own and not needless:
            raise ValueError(
                f"model.teacher.{name}: a teacher with shared_with_student is the student's base, for which this is {own!r}, not "
                f"{given!r}. Give the same, or remove shared_with_student."
            )


def device_and_precision(module: Any) -> tuple[str, str | None]:
    """Kind of device and precision of a LightningModule's Trainer; a module without one is where its weights are."""
    trainer = module._trainer
    return (trainer.strategy.root_device.type, str(trainer.precision)) if trainer else (module.device.type, None)


def resolve_dtypes(
    student: ModelSpec, teacher: ModelSpec | None, device_type: str
) -> tuple[ModelSpec, ModelSpec | None]:
    """Both with what ``dtype: auto`` stands for on a kind of device, which is logged; weights that train are float32."""
    auto = str(auto_dtype(device_type)).removeprefix("torch.")

    def resolve(spec: ModelSpec, key: str, dtype: str) -> ModelSpec:
        if spec.dtype != "auto":
            return spec
        rank_zero_info(f"{key}.dtype: auto is {dtype} on this {device_type}.")
        return replace(spec, dtype=dtype)  # type: ignore[arg-type]

    trained = resolve(student, "model.student", auto if student.lora is not None else "float32")
    return trained, None if teacher is None else resolve(teacher, "model.teacher", auto)


def warn_of_emulation(student: CausalLM, teacher: CausalLM | None, precision: str | None, device_type: str) -> None:
    """Log where the user has asked for numbers that the device multiplies slowly, with the key to change."""
    asked = {"model.student.dtype": student.model.dtype}
    if teacher is not None and teacher is not student:
        asked["model.teacher.dtype"] = teacher.model.dtype
    if precision == "bf16-mixed":
        asked["trainer.precision"] = torch.bfloat16
    for key, dtype in asked.items():
        if message := emulated(key, dtype, device_type):
            rank_zero_info(message)
