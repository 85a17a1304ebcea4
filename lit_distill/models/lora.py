"""Low-rank adapters (LoRA) in a student's linear layers: only the adapters are trained, the base model is frozen.

peft injects its layers into the plain `transformers` model, so body, head and cache keep their places. Trained weights are float32,
for a base of any dtype. A checkpoint contains the trained weights and a fingerprint of the base.

Hu et al. 2021, https://arxiv.org/abs/2106.09685; rank-stabilised scaling: https://arxiv.org/abs/2312.03732; DoRA:
https://arxiv.org/abs/2402.09353.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"
"""peft's default name of an adapter; part of the weight names in checkpoints."""


@dataclass
class LoraSpec:
    """Adapters in a student's linear layers; fields as in peft's `LoraConfig`."""

    r: int = 8
    """Rank of the update of a layer's weight."""
    lora_alpha: float = 16
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout probability of the adapter's inputs in training; there is no dropout in generation."""
    target_modules: list[str] | str = "all-linear"
    """Layers to adapt: a list of name endings, such as [q_proj, v_proj], a regular expression for full names, or all-linear for all
    linear layers of the decoder."""
    modules_to_save: list[str] | None = None
    """Modules whose full weights are trained, by name endings, such as [lm_head]."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    use_dora: bool = False
    """Train the norm of each weight row separately from its direction (DoRA)."""


def check_lora(lora: LoraSpec, key: str) -> None:
    """Check the settings that need no model, and that peft is installed.

    Args:
        lora: the adapters.
        key: the argument that gives them, such as ``student.lora``.

    Raises:
        ValueError: if a setting is invalid or peft is missing; names the key.
    """
    if lora.r < 1:
        raise ValueError(f"{key}.r: expected a rank of at least 1, got {lora.r}. To train all weights, remove lora.")
    if not lora.lora_alpha > 0:
        raise ValueError(f"{key}.lora_alpha: expected a number > 0, got {lora.lora_alpha}. A common value is 2 * r.")
    if not 0 <= lora.lora_dropout < 1:
        raise ValueError(f"{key}.lora_dropout: expected a probability in [0, 1), got {lora.lora_dropout}.")
    if not lora.target_modules:
        raise ValueError(
            f"{key}.target_modules is empty. Give names of layers, such as [q_proj, v_proj], or all-linear."
        )
    if isinstance(lora.target_modules, str):
        try:
            re.compile(lora.target_modules)
        except re.error as error:
            raise ValueError(
                f"{key}.target_modules: {lora.target_modules!r} is not a regular expression ({error}). To give names, use a list."
            ) from error
    if find_spec("peft") is None:
        raise ValueError(f"{key}: adapters need peft, which is not installed. Run: pip install 'lit-distill[lora]'")


def add_lora(model: PreTrainedModel, lora: LoraSpec, key: str) -> None:
    """Inject adapters into ``model`` in place and freeze all other weights. torch's generator draws their initial values.

    Args:
        model: its weights may be on the meta device and stay there; the adapters get values in any case.
        lora: the adapters.
        key: their YAML key, for messages.

    Raises:
        ValueError: if a name matches no layer, or a layer that cannot have such an adapter here or in peft.
    """
    from peft import LoraConfig, inject_adapter_in_model

    saved = _check_names(model, lora, key)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        **asdict(replace(lora, modules_to_save=saved or None)),
    )
    model.requires_grad_(False)
    before = torch.get_rng_state()
    with (
        warnings.catch_warnings()
    ):  # GPT-2's layers are transposed, its head is not; peft corrects fan_in_fan_out for each layer
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")  # false for fused experts
        try:
            inject_adapter_in_model(config, model, ADAPTER)
        except ValueError as error:
            message = str(error).rstrip(".")
            raise ValueError(f"{key}: {message}. Change this setting, or {key}.target_modules.") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    torch.set_rng_state(before)  # undo the draws above, which depend on the device of the weights
    layers: list[Any] = list(model.modules())
    for layer in layers:
        if hasattr(layer, "reset_lora_parameters") and ADAPTER in (*layer.lora_A, *layer.lora_embedding_A):
            _materialize(layer)
            with _moved_to_cpu(layer):
                layer.reset_lora_parameters(ADAPTER, True)


@contextmanager
def _moved_to_cpu(layer: Any) -> Iterator[None]:
    """Move an adapter to the CPU inside the context, so that its random values are the same for every device."""
    halves = [getattr(layer, name) for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")]
    parts = [half[ADAPTER] for half in halves if ADAPTER in half]
    parameters = [part if isinstance(part, nn.Parameter) else part.weight for part in parts]
    devices = [parameter.device for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.cpu()
    yield
    for parameter, device in zip(parameters, devices, strict=True):
        parameter.data = parameter.data.to(device)


def _materialize(layer: Any) -> None:
    """Allocate an adapter on the CPU if it is on the meta device."""
    for half in ("lora_A", "lora_B"):
        if ADAPTER in getattr(layer, half) and getattr(layer, half)[ADAPTER].weight.is_meta:
            getattr(layer, half)[ADAPTER].to_empty(device="cpu")
    for half in ("lora_embedding_A", "lora_embedding_B"):
        if ADAPTER in getattr(layer, half) and (there := getattr(layer, half)[ADAPTER]).is_meta:
            getattr(layer, half)[ADAPTER] = nn.Parameter(torch.empty_like(there, device="cpu"))


def _check_names(model: PreTrainedModel, lora: LoraSpec, key: str) -> list[str]:
    """Check all names; return full names of ``modules_to_save``, since in peft "norm" also matches "input_layernorm"."""
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {id(inside), id(outside)}
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if _is_adaptable(module)}
    targets = lora.target_modules
    if isinstance(targets, str):
        chosen = [] if targets == "all-linear" else [name for name in layers if re.fullmatch(targets, name)]
        if targets != "all-linear" and not chosen:
            raise ValueError(f"{key}.target_modules: {targets!r} matches no layer. The model has {_endings(layers)}.")
    else:
        chosen = _match_endings(layers, targets, f"{key}.target_modules")
    saved = _match_endings(modules, lora.modules_to_save or [], f"{key}.modules_to_save")
    for name, names in (("target_modules", chosen), ("modules_to_save", saved)):
        if inside.weight is outside.weight and any(id(part) in ends for n in names for part in modules[n].modules()):
            raise ValueError(
                f"{key}.{name} contains the embeddings or the head, which are one tied weight (tie_word_embeddings). An "
                "adapter would untie them. Remove them from the list."
            )
    if any(modules[name] is outside for name in chosen) and (lora.lora_dropout or lora.use_dora):
        raise ValueError(
            f"{key}.target_modules contains the output head. Its adapter is added to its weight, so lora_dropout and use_dora "
            "are not supported for it. Set lora_dropout: 0 and use_dora: false, or put the head into modules_to_save."
        )
    return saved


def _is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ in ("Conv1D", "QLinear")


def _match_endings(modules: Iterable[str], endings: Iterable[str], key: str) -> list[str]:
    found = []
    for ending in endings:
        here = [name for name in modules if name == ending or name.endswith(f".{ending}")]
        if not here:
            raise ValueError(f"{key}: the model has no {ending!r}. It has {_endings(modules)}.")
        found += here
    return found


def _endings(modules: Iterable[str]) -> str:
    """The last part of each module name, sorted; numbers are left out."""
    endings = {name.rpartition(".")[2] for name in modules}
    return ", ".join(sorted(ending for ending in endings if ending and not ending.isdigit()))


def head_weight(projection: nn.Module) -> Tensor:
    """The effective weight ``[V, H]`` of an output head, with gradient: with its adapter added, unless adapters are disabled."""
    weight: Tensor = projection.weight  # type: ignore[assignment]
    if ADAPTER in getattr(projection, "lora_A", ()) and not projection.disable_adapters:
        layer: Any = projection
        weight = weight + layer.get_delta_weight(ADAPTER)  # in float32, so that a small update is not rounded away
    return weight


def restrict_state_dict_to_trainable(lm: nn.Module) -> None:
    """Restrict state dicts of ``lm`` to trained weights; loading is strict for these and ignores missing frozen weights.

    Args:
        lm: a module, or a part of one, whose frozen weights are loaded from its base model.
    """
    trained = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    prefixes: list[str] = []

    def drop_frozen(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        for name in [name for name in state if name.startswith(prefix) and name[len(prefix) :] not in trained]:
            del state[name]

    def store_prefix(_module: nn.Module, _state: dict[str, Any], prefix: str, *_others: Any) -> None:
        prefixes[:] = [prefix]

    def ignore_missing_frozen(_module: nn.Module, incompatible: Any) -> None:
        prefix = prefixes[0]
        incompatible.missing_keys[:] = [
            name for name in incompatible.missing_keys if not name.startswith(prefix) or name[len(prefix) :] in trained
        ]

    lm.register_state_dict_post_hook(drop_frozen)
    lm.register_load_state_dict_pre_hook(store_prefix)
    lm.register_load_state_dict_post_hook(ignore_missing_frozen)


def adapter_layers(model: nn.Module) -> list[Any]:
    """The modules that have an adapter, which can be disabled."""
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]


@contextmanager
def adapters_disabled(layers: Sequence[Any]) -> Iterator[None]:
    """Use the base model inside the context. Unlike peft's own function, this does not change `requires_grad`."""
    for module in layers:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in layers:
            module._disable_adapters = False


def fingerprint(model: nn.Module, stored: Callable[[str, list[int]], Tensor] | None = None) -> int:
    """A checksum of the frozen base: of 16 values of each weight, in bfloat16 so that it is the same for every dtype of the base.

    Args:
        model: if it has a ``base_fingerprint``, stored before sharding, that is returned.
        stored: reads values of a weight on the meta device, by its name and their positions.
    """
    if (known := getattr(model, "base_fingerprint", None)) is not None:
        return int(known)
    code = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or type(parameter.data) is not Tensor or not parameter.is_floating_point():
            continue
        step = max(1, parameter.numel() // 16)
        positions = list(range(0, parameter.numel(), step))[:16]
        found = stored(name, positions) if stored and parameter.is_meta else parameter.detach().flatten()[positions]
        values = found.to(parameter.dtype).to(torch.bfloat16).view(torch.int16).tolist()
        code = zlib.crc32(repr(values).encode(), code)
    return code
