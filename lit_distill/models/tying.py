"""Weights that are tied by the config, such as head and embeddings, but stored with different values.

Tools that merge models write such folders. transformers unties the weights when it loads them, and so does every reader here. The
config is then changed to untied, so that checkpoints, shards and exports treat the weights as separate.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """The tied weights of the config, each with the weight it is tied to: ``lm_head.weight: model.embed_tokens.weight``."""
    names: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    return names


def accept_untied(model: PreTrainedModel, where: str) -> None:
    """If transformers untied weights while loading, set the config to untied.

    Args:
        model: a model just loaded by transformers.
        where: key and path of the model, for the log.
    """
    part = {name: attrgetter(name)(model) for pair in tied_names(model).items() for name in pair}
    untied = [name for name, source in tied_names(model).items() if part[name] is not part[source]]
    if untied:
        mark_untied(model.config, where, untied)


def separate(model: PreTrainedModel, names: Iterable[str], where: str) -> None:
    """Untie weights: give each its own parameter, without values, and set the config to untied.

    Args:
        model: a model just built, without values.
        names: names of the weights, among those of `tied_names`.
        where: key and path of the model, for the log.
    """
    untied = list(names)
    for name in untied:
        parent, _, own = name.rpartition(".")
        tied: Tensor = attrgetter(name)(model)
        setattr(model.get_submodule(parent), own, nn.Parameter(torch.empty_like(tied), tied.requires_grad))
    if untied:
        mark_untied(model.config, where, untied)


def mark_untied(config: PreTrainedConfig, where: str | None = None, names: Iterable[str] = ()) -> None:
    """Set a config to untied head and embeddings; with ``where``, log a warning."""
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
    if where is not None:
        log.warning(
            "%s: config.json ties weights that have different values in the files: %s. They are trained and exported untied.",
            where,
            ", ".join(names),
        )
