"""Checks of a loaded model: it is causal, has all its weights, and all of them are finite."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from lit_distill.models.quantization import is_plain

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)


def check_causal(config: PreTrainedConfig, key: str, location: str) -> None:
    """Refuse models that are not causal."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        kind = "a masked language model with bidirectional attention"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in getattr(
        config, "auto_map", {}
    ):
        kind = "not a language model that transformers supports as AutoModelForCausalLM"
    else:
        return
    raise ValueError(
        f"{key}.path: {location} ({config.model_type}) is {kind}. Give a causal, decoder-only language model."
    )


def check_report(report: dict[str, Any], where: str) -> None:
    """Raise an error for missing or mismatched weights, which transformers only logs."""
    if report["mismatched_keys"]:
        shapes = [f"{name} (stored {tuple(a)}, config {tuple(b)})" for name, a, b in sorted(report["mismatched_keys"])]
        raise ValueError(f"{where} has weights whose shapes contradict config.json: {some(shapes)}.")
    if report["missing_keys"]:
        raise ValueError(
            f"{where} lacks weights, which would be initialised randomly: {some(sorted(report['missing_keys']))}. "
            "Check whether it is another type of model (a classifier, a bare encoder) or an incomplete copy."
        )
    if report["unexpected_keys"]:
        log.warning("%s has weights that the model does not use: %s", where, some(sorted(report["unexpected_keys"])))


def check_finite(model: PreTrainedModel, where: str) -> None:
    """Refuse NaN and infinite weights, naming their tensors. Quantised weights are integers and are not checked."""
    plain = {name: weight.detach() for name, weight in model.named_parameters() if weight.numel() and is_plain(weight)}
    refuse_infinite([name for name, weight in plain.items() if not is_finite(weight)], where)


def refuse_infinite(bad: list[str], where: str) -> None:
    """Raise a ValueError that names the damaged weights ``bad``, if there are any."""
    if bad:
        raise ValueError(
            f"{where} has NaN or infinite weights in {some(bad)}. The file is damaged; download or copy it again."
        )


def is_finite(weight: torch.Tensor) -> bool:
    """Whether a non-empty tensor has neither NaN nor infinite values."""
    smallest, largest = torch.aminmax(weight)  # one pass and no copy; NaN propagates to both
    return bool(torch.isfinite(smallest) & torch.isfinite(largest))


def some(names: list[str], limit: int = 10) -> str:
    """The first ``limit`` names, and the number of the others."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
