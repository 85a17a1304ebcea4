"""The loss by which mixtures of experts balance their routers, which is no part of a run here.

It is a product of two means over all tokens of a step, so no sum over micro-batches and ranks gives its gradient in one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def note_on_routers(config: PreTrainedConfig) -> str | None:
    """What to tell the user whose student has such a loss; None if it has none.

    Args:
        config: the student's.
    """
    weight = getattr(config.get_text_config(decoder=True), "router_aux_loss_coef", None)
    if not weight:
        return None
    return (
        f"model.student.path: its experts were balanced by an auxiliary loss of the routers (router_aux_loss_coef: {weight} in its "
        "config). That loss is not trained here, whatever output_router_logits says: the routers learn from the objectives alone."
    )
