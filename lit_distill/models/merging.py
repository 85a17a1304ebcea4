"""Export of a student with adapters: merged into a plain model, or the adapter alone."""

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
    """Check whether the student can be exported as requested.

    Raises:
        ValueError: if the adapter cannot be merged into its base, or its base is not stored in any folder.
    """
    if spec.lora is None:
        if not merge:
            raise ValueError(
                "merge_lora: is false, but the student has no adapter. Set model.student.lora, or remove merge_lora."
            )
        return
    if merge and is_quantized(spec, load_config(spec, "student")):
        raise ValueError(
            "merge_lora: the student's base is quantised. Merging the adapter into it would round away "
            "part of what was trained. Set merge_lora: false to write the adapter alone."
        )
    if not merge and (spec.keep_layers is not None or spec.drop_layers is not None):
        raise ValueError(
            "merge_lora: is false, but layers were removed from the adapter's base (model.student.keep_layers, drop_layers) "
            "and the pruned base is not stored in any folder. Set merge_lora: true."
        )


def adapted_model(spec: ModelSpec, saved: Mapping[str, Any], weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The student of a checkpoint: its base, loaded again, with the trained adapter.

    Args:
        spec: spec of the student.
        saved: the student's metadata in the checkpoint, see `student_metadata`.
        weights: the student's weights in the checkpoint, which are all that were trained.

    Raises:
        ValueError: if the base cannot be loaded, or is a different model.
    """
    assert spec.lora is not None
    model = load_model(spec, "student")
    add_lora(model, spec.lora, "student.lora")
    check_same_adapters(dict(saved), spec.lora, model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == weights.keys(), (
        "this version of peft names the trained weights differently than the checkpoint does"
    )
    model.load_state_dict(dict(weights), strict=False)
    return model


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of the plain model that is equivalent to the adapted one. Weights that an adapter changes are float32 copies.

    Args:
        model: a model changed by `add_lora`; stays as it is.
    """
    merged: dict[str, Tensor] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if _is_adapted(module) and not name.startswith(
            tuple(inside)
        ):  # only the outermost: a wrapper may contain another
            inside.append(f"{name}.")
            part = _merge_adapters(copy.deepcopy(module).cpu().float())
            merged |= {f"{name}.{own}": value for own, value in part.state_dict().items()}
    others = {n: w.cpu() for n, w in model.state_dict().items() if not n.startswith(tuple(inside))}
    return others | merged


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    return isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)


def _merge_adapters(module: Any) -> nn.Module:
    """Merge the adapters of ``module`` in place and return it without peft's wrappers.

    If a module has several adapted parameters, such as the fused experts of a layer, peft nests one wrapper for each.
    """
    if _is_adapted(module):
        if hasattr(module, "modules_to_save"):
            return _merge_adapters(module.modules_to_save[ADAPTER])
        module.merge()
        return _merge_adapters(module.base_layer)
    for name, child in module.named_children():
        setattr(module, name, _merge_adapters(child))
    return module


def save_adapter(model: PreTrainedModel, spec: ModelSpec, folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Write the adapter in peft's format: `PeftModel.from_pretrained(base, folder)`.

    Args:
        model: a model changed by `add_lora`.
        spec: spec of the student; its path is written as the adapter's base.
        folder: output folder.
        dtype: dtype of the written weights; float32 by default.

    Returns:
        The written weights by their names in peft.
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
