"""Quantised models: uses the quantisation of `transformers`, configured in the YAML or in the model's own config."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers.utils.quantization_config import QuantizationConfigMixin


def quantization_config(given: Mapping[str, Any], key: str) -> QuantizationConfigMixin:
    """Build the quantisation config of ``transformers`` from a YAML mapping.

    Args:
        given: ``quant_method`` and the arguments of its class, such as ``{quant_method: bitsandbytes, load_in_4bit: true}``. For
            torchao, ``quant_type`` is the name of one of its classes, or ``{name: {argument: value}}``.
        key: its YAML key, for messages.

    Raises:
        ValueError: if the method or an argument does not exist, or the package of the method is missing.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as CLASSES

    arguments = dict(given)
    method = str(arguments.pop("quant_method", None))
    bits = "_4bit" if arguments.get("load_in_4bit") else "_8bit"
    kind = CLASSES.get(method) or CLASSES.get(method + bits)
    if kind is None:
        known = sorted({name.removesuffix("_4bit").removesuffix("_8bit") for name in CLASSES})
        raise ValueError(f"{key}.quant_method: expected one of {', '.join(known)}, got {given.get('quant_method')!r}.")
    allowed = [name for name, p in inspect.signature(kind).parameters.items() if p.kind is not p.VAR_KEYWORD]
    if unknown := [name for name in arguments if name not in allowed]:
        raise ValueError(f"{key}.{unknown[0]}: {kind.__name__} has no such argument. It has {', '.join(allowed)}.")
    if method == "bitsandbytes" and not (arguments.get("load_in_4bit") or arguments.get("load_in_8bit")):
        raise ValueError(f"{key}: bitsandbytes needs load_in_8bit: true or load_in_4bit: true.")
    try:
        if method == "torchao":
            arguments["quant_type"] = _torchao_type(arguments.get("quant_type"))
        config: QuantizationConfigMixin = kind(**arguments)
    except Exception as error:  # each class checks values, types and its package in its own way
        raise ValueError(f"{key}: {kind.__name__}: {error}") from error
    return config


def _torchao_type(given: Any) -> Any:
    try:
        from torchao import quantization
    except ImportError as error:
        raise ValueError("torchao is not installed. Run: pip install torchao") from error
    name, arguments = next(iter(given.items())) if isinstance(given, dict) and given else (given, None)
    kind = getattr(quantization, str(name), None)
    if not (inspect.isclass(kind) and str(name).endswith("Config")):
        known = sorted(n for n in vars(quantization) if n.endswith("Config") and not n.startswith("_"))
        raise ValueError(f"quant_type: expected one of {', '.join(known)}, got {name!r}.")
    return kind(**(arguments or {}))


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is a plain floating-point tensor, i.e. not quantised."""
    return weight.is_floating_point() and type(weight.data) in (torch.Tensor, torch.nn.Parameter)
