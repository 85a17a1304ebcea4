"""Metadata of the student in a checkpoint: enough to rebuild the model, and to recognise a different one."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from lit_distill.models.lora import LoraSpec, fingerprint

if TYPE_CHECKING:
    from torch import nn

    from lit_distill.models.causal_lm import CausalLM
    from lit_distill.models.spec import ModelSpec


def student_metadata(spec: ModelSpec, lm: CausalLM) -> dict[str, Any]:
    """Plain values: the spec, the resulting configs and, with adapters, the fingerprint of the base."""
    record = {
        "spec": asdict(spec),
        "config": lm.model.config.to_dict(),
        "generation_config": lm.model.generation_config.to_dict(),
    }
    return record if spec.lora is None else {**record, "base": fingerprint(lm)}


def check_same_adapters(saved: dict[str, Any], lora: LoraSpec | None, model: nn.Module) -> None:
    """Check that a checkpoint's adapters fit the student that will load them.

    Args:
        saved: the student's metadata in the checkpoint, under ``student``.
        lora: ``model.student.lora``.
        model: the student.

    Raises:
        ValueError: if the LoRA settings or the base weights differ.
    """
    then = saved.get("spec", {}).get("lora")
    before = then and LoraSpec(**then)
    if before != lora and (not before or not lora or replace(before, lora_dropout=lora.lora_dropout) != lora):
        raise ValueError(
            f"ckpt_path: the checkpoint's student has lora {then}, but model.student.lora is {lora and asdict(lora)}. Set the "
            "values it was trained with."
        )
    if lora and saved.get("base", (now := fingerprint(model))) != now:
        raise ValueError(
            "ckpt_path: the checkpoint holds an adapter that was trained on other base weights than those of model.student.path. "
            "Set model.student.path to the model on which the adapter was trained."
        )
