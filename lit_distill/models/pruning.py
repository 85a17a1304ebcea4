"""Layer pruning: keeps some of the decoder's layers. The pruned model saves, loads and uses its KV cache like any other."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PRUNED_FROM = "pruned_from_layers"
"""Attribute of a pruned model's config: the number of layers that it had at first."""
INDEX_NAMES = ("layer_idx", "layer_id", "layer_num", "layer_number")
"""Names of the attribute with a module's layer index, which is its index in the KV cache."""


def resolve_layers(
    num_layers: int, keep: Sequence[int] | int | None, drop: Sequence[int] | None, key: str
) -> list[int] | None:
    """The layers to keep, or None for all of them.

    Args:
        num_layers: number of layers of the stored model.
        keep: indices in the wanted order (negative ones count from the end), or a number of evenly spaced layers that
            include the first and the last (only the first if it is 1).
        drop: indices of the layers to remove.
        key: YAML key of the model, for messages.

    Raises:
        ValueError: if both are given, if indices are out of range or repeated, or if no layer is left.
    """
    if keep is not None and drop is not None:
        raise ValueError(f"{key}.keep_layers: is given, and drop_layers too. Give only one of them.")
    if drop is not None:
        dropped = _indices(num_layers, drop, f"{key}.drop_layers")
        if len(dropped) == num_layers:
            raise ValueError(f"{key}.drop_layers names all {num_layers} layers. Leave at least one.")
        return [layer for layer in range(num_layers) if layer not in dropped]
    if keep is None:
        return None
    if not isinstance(keep, int):
        if not keep:
            raise ValueError(f"{key}.keep_layers: is an empty list. Name at least one of the {num_layers} layers.")
        return _indices(num_layers, keep, f"{key}.keep_layers")
    if not 1 <= keep <= num_layers:
        raise ValueError(f"{key}.keep_layers: {keep}, but the model has {num_layers} layers: give 1 to {num_layers}.")
    return [round(position * (num_layers - 1) / max(keep - 1, 1)) for position in range(keep)]


def _indices(num_layers: int, given: Sequence[int], key: str) -> list[int]:
    wrong = [layer for layer in given if not -num_layers <= layer < num_layers]
    if wrong:
        raise ValueError(
            f"{key} has {wrong}, but the model has {num_layers} layers: 0 to {num_layers - 1}, or -1 to -{num_layers}."
        )
    indices = [layer % num_layers for layer in given]
    twice = sorted({layer for layer in indices if indices.count(layer) > 1})
    if twice:
        raise ValueError(f"{key} is {list(given)}, which names layer(s) {twice} of {num_layers} twice. Name each once.")
    return indices


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Prune the decoder to ``layers``, in place and in that order.

    Layers get new indices, which the KV cache uses, and the config's per-layer lists are pruned too. So the result can
    generate with its cache and can be saved and loaded with ``save_pretrained`` and ``from_pretrained``.

    Args:
        model: any causal language model whose decoder is one ModuleList; may be on the meta device.
        layers: indices from 0, each once.

    Raises:
        ValueError: if the decoder is not found, or if loading the pruned config would build different layers,
            as with architectures that derive a layer's type from its index.
    """
    config = model.config.get_text_config(decoder=True)
    total = config.num_hidden_layers
    parent, name = decoder_layers(model, total)
    decoder = getattr(parent, name)
    kept = nn.ModuleList(decoder[layer] for layer in layers)
    for position, layer in enumerate(kept):
        for module in layer.modules():
            for index_name in INDEX_NAMES:
                if isinstance(getattr(module, index_name, None), int):
                    setattr(module, index_name, position)
    setattr(parent, name, kept)
    for attribute, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == total and _is_per_layer(attribute):
            setattr(config, attribute, type(value)(value[layer] for layer in layers))
    config.num_hidden_layers = len(kept)
    if len(kept) < total:
        setattr(config, PRUNED_FROM, getattr(config, PRUNED_FROM, total))
    _check_rebuilds(model, kept, layers)


def decoder_layers(model: PreTrainedModel, total: int) -> tuple[nn.Module, str]:
    """The parent module and the attribute name of the decoder's layers: the outermost ModuleList of length ``total``."""
    for path, module in model.get_decoder().named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            parent, _, name = path.rpartition(".")
            return model.get_decoder().get_submodule(parent), name
    raise ValueError(
        f"{type(model).__name__} has no list of {total} decoder layers, so keep_layers and drop_layers cannot prune it."
    )


def _is_per_layer(attribute: str) -> bool:
    """Whether a config list has one entry per layer; other lists may have the same length by chance."""
    return not attribute.startswith("_") and attribute != "architectures" and "token_id" not in attribute


def _check_rebuilds(model: PreTrainedModel, kept: nn.ModuleList, layers: Sequence[int]) -> None:
    """Check on the meta device that the saved config would build the same layers."""
    try:
        config = _reread(model.config)
        with torch.device("meta"):
            rebuilt = type(model)._from_config(config)
        parent, name = decoder_layers(rebuilt, len(kept))
        same = [_description(layer) for layer in getattr(parent, name)] == [_description(layer) for layer in kept]
        reason = "the saved config would build layers of other types"
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        same, reason = False, f"the saved config would not load ({error})"
    if not same:
        raise ValueError(
            f"{type(model).__name__} cannot be pruned to layers {list(layers)} with keep_layers or drop_layers: "
            f"{reason}. The type of a layer depends on its index: choose layers that keep the pattern, or another model."
        )


def _reread(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config after saving to JSON and loading."""
    reread = type(config).from_dict(copy.deepcopy(config.to_dict()))
    reread._attn_implementation = config._attn_implementation
    return reread


def _description(layer: nn.Module) -> dict[str, tuple[type, Mapping[str, Any], Mapping[str, torch.Size]]]:
    """Types, plain attributes and parameter shapes of all submodules of a layer, without the values of weights."""
    ignored = {"training", "gradient_checkpointing"}
    return {
        path: (
            type(module),
            {
                name: value
                for name, value in vars(module).items()
                if isinstance(value, int | float | str | type(None)) and name[0] != "_" and name not in ignored
            },
            {name: parameter.shape for name, parameter in module.named_parameters(recurse=False)},
        )
        for path, module in layer.named_modules()
    }
