"""A student with adapters on its way to a file: merged into a plain model, or the adapter alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_distill.models.lora import ADAPTER, add_lora
from lit_distill.models.record import check_same_adapters
from lit_distill.models.spec import ModelSpec, is_quantized, load_config, load_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel


def check_exportable(spec: ModelSpec, merge: bool) -> None:
    """Look at whether a student can be written as its export asks for.

    Raises:
        ValueError: if what the adapter would be merged into, or belongs to, is in no folder.
    """
    if spec.lora is None:
        if not merge:
            raise ValueError(
                "export.merge_lora: is false, but the student has no adapter. Set model.student.lora or remove it."
            )
        return
    if merge and is_quantized(spec, load_config(spec, "model.student")):
        raise ValueError(
            "export.merge_lora: the student's base is quantised, and an adapter cannot be merged into "
            "it without changing what it learnt. Set export.merge_lora: false to write the adapter alone."
        )
    if not merge and (spec.keep_layers is not None or spec.drop_layers is not None):
        raise ValueError(
            "export.merge_lora: is false, but the adapter is of a base from which layers were removed (model.student.keep_layers, "
            "drop_layers), and that is in no folder. Set export.merge_lora: true."
        )


def adapted_model(spec: ModelSpec, saved: Mapping[str, Any], weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The student of a checkpoint: its base read again, with the adapter in it.

    Args:
        spec: of the student.
        saved: what the checkpoint says of the student.
        weights: what it holds of it: all that was trained.

    Raises:
        ValueError: if the base cannot be had, or is another one.
    """
    assert spec.lora is not None
    model = load_model(spec, "model.student")
    add_lora(model, spec.lora, "model.student.lora")
    check_same_adapters(dict(saved), spec.lora, model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == weights.keys(), "the checkpoint holds what this version of peft calls otherwise"
    model.load_state_dict(dict(weights), strict=False)
    return model


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights with which the plain model computes what the adapted one does; those that an adapter changes are float32 copies.

    Args:
        model: of `add_lora`; not changed.
    """
    merged: dict[str, Tensor] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if _is_adapted(module) and not name.startswith(tuple(inside)):  # the outermost: one may wrap another
            inside.append(f"{name}.")
            part = _plain(copy.deepcopy(module).cpu().float())
            merged |= {f"{name}.{own}": value for own, value in part.state_dict().items()}
    others = {n: w.cpu() for n, w in model.state_dict().items() if not n.startswith(tuple(inside))}
    return others | merged


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    return isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)


def _plain(module: Any) -> nn.Module:
    """What peft has put adapters into, with these merged; changes ``module``.

    Of a module with several adapted parameters, such as the fused experts of a layer, peft wraps the wrapped one again.
    """
    if _is_adapted(module):
        if hasattr(module, "modules_to_save"):
            return _plain(module.modules_to_save[ADAPTER])
        module.merge()
        return _plain(module.base_layer)
    for name, child in module.named_children():
        setattr(module, name, _plain(child))
    return module


def save_adapter(model: PreTrainedModel, spec: ModelSpec, folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Write the adapter as peft reads it: `PeftModel.from_pretrained(base, folder)`.

    Args:
        model: of `add_lora`.
        spec: of the student; says where its base is.
        folder: where to.
        dtype: of the written weights; float32 by default.

    Returns:
        What was written, by the names of peft.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config: Any = copy.deepcopy(model.peft_config[ADAPTER])
    base = Path(spec.path).expanduser()
    config.base_model_name_or_path = str(base.resolve()) if base.exists() else spec.path
    config.revision = spec.revision
    config.inference_mode = True
    own = get_peft_model_state_dict(model, model.state_dict(), save_embedding_layers=False)
    weights = {f"base_model.model.{name}": value.to("cpu", dtype).contiguous() for name, value in own.items()}
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return weights
