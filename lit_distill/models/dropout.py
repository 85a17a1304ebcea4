"""Disables dropout permanently, so that a model gives the same logits in training mode as in generation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def disable_dropout(model: PreTrainedModel) -> None:
    """Set all dropout probabilities and the noise of routers to zero, in place.

    The policy ratio compares log-probabilities of two forward passes of the same model, and dropout would make
    them differ. The model's config is changed too, since attention functions and exports read it.

    Args:
        model: changed in place; ``train()`` and ``eval()`` then compute the same.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _zero_probabilities(module)
        config = getattr(module, "config", None)
        if config is not None and not isinstance(config, nn.Module):
            _zero_probabilities(config)


def _zero_probabilities(owner: object) -> None:
    for name, value in list(vars(owner).items()):
        if isinstance(value, float) and any(part in name for part in ("drop", "jitter_noise")):
            setattr(owner, name, 0.0)
