"""Weights that are one by the config, such as head and embeddings, and files in which they are two.

Tools that merge models leave such folders. transformers keeps the two apart when it loads them, and so does every reader here; the
config is then changed, so that all that comes after (checkpoints, shards, exports) takes the weights for what they are.
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
    """The weights that the config ties, each with the weight that it is, such as ``lm_head.weight: model.embed_tokens.weight``."""
    names: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    return names


def accept_untied(model: PreTrainedModel, where: str) -> None:
    """Let the config of a model that was just loaded say what its weights are.

    Args:
        model: as transformers has loaded it.
        where: key and path of the model, for the log.
    """
    part = {name: attrgetter(name)(model) for pair in tied_names(model).items() for name in pair}
    apart = [name for name, source in tied_names(model).items() if part[name] is not part[source]]
    if apart:
        mark_untied(model.config, where, apart)


def separate(model: PreTrainedModel, names: Iterable[str], where: str) -> None:
    """Give tied weights tensors of their own, without values, and let the config say so.

    Args:
        model: just built, without values.
        names: of the weights, among those of `tied_names`.
        where: key and path of the model, for the log.
    """
    apart = list(names)
    for name in apart:
        parent, _, own = name.rpartition(".")
        tied: Tensor = attrgetter(name)(model)
        setattr(model.get_submodule(parent), own, nn.Parameter(torch.empty_like(tied), tied.requires_grad))
    if apart:
        mark_untied(model.config, where, apart)


def mark_untied(config: PreTrainedConfig, where: str | None = None, names: Iterable[str] = ()) -> None:
    """Let a config say that head and embeddings are two weights; with ``where``, tell the user."""
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
    if where is not None:
        log.warning(
            "%s: its config.json ties weights that its files hold apart: %s. They stay apart, and are trained and saved so.",
            where,
            ", ".join(names),
        )
