"""What a checkpoint says of its student beside the weights: enough to rebuild it, and to tell it from another."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from lit_distill.models.lora import LoraSpec, fingerprint

if TYPE_CHECKING:
    from torch import nn

    from lit_distill.models.causal_lm import CausalLM
    from lit_distill.models.spec import ModelSpec


def student_record(spec: ModelSpec, lm: CausalLM) -> dict[str, Any]:
    """Plain values: what was asked for, the configs that came of it and, under adapters, the fingerprint of the base."""
    record = {
        "spec": asdict(spec),
        "config": lm.model.config.to_dict(),
        "generation_config": lm.model.generation_config.to_dict(),
    }
    return record if spec.lora is None else {**record, "base": fingerprint(lm)}


def check_same_adapters(saved: dict[str, Any], lora: LoraSpec | None, model: nn.Module) -> None:
    """Compare a checkpoint's student with the one that is to have its weights.

    Args:
        saved: what `DistillationModule` keeps in a checkpoint beside its weights, under ``student``.
        lora: ``model.student.lora``.
        model: the student.

    Raises:
        ValueError: if they are adapted otherwise, or what is adapted differs.
    """
    then = saved.get("spec", {}).get("lora")
    before = then and LoraSpec(**then)
    if before != lora and (not before or not lora or replace(before, lora_dropout=lora.lora_dropout) != lora):
        raise ValueError(
            f"ckpt_path: the checkpoint's student has lora {then}, and model.student.lora is {lora and asdict(lora)}. Give what it "
            "was trained with."
        )
    if lora and saved.get("base", (now := fingerprint(model))) != now:
        raise ValueError(
            "ckpt_path: the checkpoint holds an adapter that was trained on other base weights than those of model.student.path. "
            "Give the path of the model that it was trained on."
        )
