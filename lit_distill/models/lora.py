"""Low-rank adapters (LoRA) in a student's linear layers: they train, and the base model stays as it was loaded.

The layers are peft's, put into the plain `transformers` model, so its body, head and cache are where they were. What trains is
float32 over a base of any dtype. A checkpoint holds what trains and a fingerprint of the base.

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
"""The name that peft gives an adapter that has none; part of the names in checkpoints."""


@dataclass
class LoraSpec:
    """Adapters in a student's linear layers, in the words of peft's `LoraConfig`."""

    r: int = 8
    """Rank of the update of a layer's weight."""
    lora_alpha: float = 16
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Share of an adapter's inputs that is dropped while it learns; never while text is written."""
    target_modules: list[str] | str = "all-linear"
    """Layers to adapt: the ends of their names, such as [q_proj, v_proj], a regular expression for whole names, or all linear
    layers of the decoder."""
    modules_to_save: list[str] | None = None
    """Modules that are trained whole, by the ends of their names, such as [lm_head]."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    use_dora: bool = False
    """Learn the norm of each row of the weight apart from its direction."""


def check_lora(lora: LoraSpec, key: str) -> None:
    """Look at numbers that need no model, and whether peft is there.

    Args:
        lora: the adapters.
        key: their YAML key, such as ``model.student.lora``.

    Raises:
        ValueError: naming the key.
    """
    if lora.r < 1:
        raise ValueError(f"{key}.r: expected a rank of at least 1, got {lora.r}. To train all weights, remove {key}.")
    if not lora.lora_alpha > 0:
        raise ValueError(f"{key}.lora_alpha: expected a number > 0, got {lora.lora_alpha}. Usual is 2 * r.")
    if not 0 <= lora.lora_dropout < 1:
        raise ValueError(f"{key}.lora_dropout: expected a share in [0, 1), got {lora.lora_dropout}.")
    if not lora.target_modules:
        raise ValueError(
            f"{key}.target_modules is empty. Name layers, such as [q_proj, v_proj], or say all-linear, which is the default."
        )
    if isinstance(lora.target_modules, str):
        try:
            re.compile(lora.target_modules)
        except re.error as error:
            raise ValueError(
                f"{key}.target_modules: {lora.target_modules!r} is no regular expression ({error}). To name layers, give a list."
            ) from error
    if find_spec("peft") is None:
        raise ValueError(f"{key}: adapters need peft, which is not installed. Run: pip install 'lit-distill[lora]'")


def add_lora(model: PreTrainedModel, lora: LoraSpec, key: str) -> None:
    """Put adapters into ``model``, in place, and freeze all else; what they draw first, from torch's generator, changes nothing.

    Args:
        model: its weights may be on the meta device and remain there; its adapters then get their values all the same.
        lora: the adapters.
        key: their YAML key, for messages.

    Raises:
        ValueError: if a name is that of no layer, or of one whose adapter could not be respected, or that peft cannot adapt so.
    """
    from peft import LoraConfig, inject_adapter_in_model

    whole = _check_names(model, lora, key)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        **asdict(replace(lora, modules_to_save=whole or None)),
    )
    model.requires_grad_(False)
    before = torch.get_rng_state()
    with warnings.catch_warnings():  # GPT-2's layers are transposed, its head is not, and peft corrects that one by one
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")  # fused experts do match
        try:
            inject_adapter_in_model(config, model, ADAPTER)
        except ValueError as error:
            said = str(error).rstrip(".")
            raise ValueError(f"{key}: {said}. Change that, or name other layers in {key}.target_modules.") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    torch.set_rng_state(before)  # the draws above depend on where the weights are
    layers: list[Any] = list(model.modules())
    for layer in layers:
        if hasattr(layer, "reset_lora_parameters") and ADAPTER in (*layer.lora_A, *layer.lora_embedding_A):
            _materialize(layer)
            with _on_the_processor(layer):
                layer.reset_lora_parameters(ADAPTER, True)


@contextmanager
def _on_the_processor(layer: Any) -> Iterator[None]:
    """Have an adapter in host memory for a while: what is drawn there is the same whatever the device."""
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
    """Give an adapter that is where its layer has no values some of its own."""
    for half in ("lora_A", "lora_B"):
        if ADAPTER in getattr(layer, half) and getattr(layer, half)[ADAPTER].weight.is_meta:
            getattr(layer, half)[ADAPTER].to_empty(device="cpu")
    for half in ("lora_embedding_A", "lora_embedding_B"):
        if ADAPTER in getattr(layer, half) and (there := getattr(layer, half)[ADAPTER]).is_meta:
            getattr(layer, half)[ADAPTER] = nn.Parameter(torch.empty_like(there, device="cpu"))


def _check_names(model: PreTrainedModel, lora: LoraSpec, key: str) -> list[str]:
    """The whole names of the modules to save: peft would take "norm" for the end of "input_layernorm" too."""
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {id(inside), id(outside)}
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if _is_adaptable(module)}
    targets = lora.target_modules
    if isinstance(targets, str):
        chosen = [] if targets == "all-linear" else [name for name in layers if re.fullmatch(targets, name)]
        if targets != "all-linear" and not chosen:
            raise ValueError(f"{key}.target_modules: {targets!r} matches no layer. There are {_endings(layers)}.")
    else:
        chosen = _named(layers, targets, f"{key}.target_modules")
    saved = _named(modules, lora.modules_to_save or [], f"{key}.modules_to_save")
    for name, names in (("target_modules", chosen), ("modules_to_save", saved)):
        if inside.weight is outside.weight and any(id(part) in ends for n in names for part in modules[n].modules()):
            raise ValueError(
                f"{key}.{name} has the embeddings or the head, which are one weight in this model (tie_word_embeddings): an "
                "adapter would separate them. Leave them out."
            )
    if any(modules[name] is outside for name in chosen) and (lora.lora_dropout or lora.use_dora):
        raise ValueError(
            f"{key}.target_modules has the output head, whose adapter is added to its weight: that leaves no place for "
            "lora_dropout or use_dora. Set both to 0 and false, or train the head whole: modules_to_save."
        )
    return saved


def _is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ in ("Conv1D", "QLinear")


def _named(modules: Iterable[str], endings: Iterable[str], key: str) -> list[str]:
    found = []
    for ending in endings:
        here = [name for name in modules if name == ending or name.endswith(f".{ending}")]
        if not here:
            raise ValueError(f"{key}: the model has no {ending!r}. There are {_endings(modules)}.")
        found += here
    return found


def _endings(modules: Iterable[str]) -> str:
    """The last parts of their names; those that are numbers tell nothing."""
    endings = {name.rpartition(".")[2] for name in modules}
    return ", ".join(sorted(ending for ending in endings if ending and not ending.isdigit()))


def head_weight(projection: nn.Module) -> Tensor:
    """The weight ``[V, H]`` that an output head applies: with its adapter, unless that is switched off, and with its gradient."""
    weight: Tensor = projection.weight  # type: ignore[assignment]
    if ADAPTER in getattr(projection, "lora_A", ()) and not projection.disable_adapters:
        layer: Any = projection
        weight = weight + layer.get_delta_weight(ADAPTER)  # float32, in which a small update is not lost
    return weight


def keep_only_trained(lm: nn.Module) -> None:
    """Let state dicts of ``lm`` hold what trains, and let them be loaded, strictly as far as that goes.

    Args:
        lm: a module, or a part of one, whose frozen weights are loaded from elsewhere.
    """
    trained = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    prefixes: list[str] = []

    def drop(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        for name in [name for name in state if name.startswith(prefix) and name[len(prefix) :] not in trained]:
            del state[name]

    def remember(_module: nn.Module, _state: dict[str, Any], prefix: str, *_others: Any) -> None:
        prefixes[:] = [prefix]

    def forgive(_module: nn.Module, incompatible: Any) -> None:
        prefix = prefixes[0]
        incompatible.missing_keys[:] = [
            name for name in incompatible.missing_keys if not name.startswith(prefix) or name[len(prefix) :] in trained
        ]

    lm.register_state_dict_post_hook(drop)
    lm.register_load_state_dict_pre_hook(remember)
    lm.register_load_state_dict_post_hook(forgive)


def switches_of(model: nn.Module) -> list[Any]:
    """The modules in which an adapter can be switched off."""
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]


@contextmanager
def switched_off(switches: Sequence[Any]) -> Iterator[None]:
    """The base model for a while; unlike peft's own switch it leaves alone what requires a gradient."""
    for module in switches:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in switches:
            module._disable_adapters = False


def fingerprint(model: nn.Module, stored: Callable[[str, list[int]], Tensor] | None = None) -> int:
    """A number that tells one frozen base from another: of 16 values of each weight, in bfloat16, the coarsest that it may have.

    Args:
        model: may have noted it before its weights were cut into shards.
        stored: where weights are on the meta device, gives the values at some positions of the one of that name.
    """
    if (noted := getattr(model, "base_fingerprint", None)) is not None:
        return int(noted)
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
