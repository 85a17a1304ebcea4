"""Notice that the auxiliary load-balancing loss of mixture-of-experts routers is not trained.

That loss is a product of two means over all tokens of a step. Its gradient is therefore not a sum over micro-batches and ranks, and
cannot be computed in one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def note_on_routers(config: PreTrainedConfig) -> str | None:
    """Message for the user if the student has an auxiliary router loss, else None.

    Args:
        config: config of the student.
    """
    weight = getattr(config.get_text_config(decoder=True), "router_aux_loss_coef", None)
    if not weight:
        return None
    return (
        f"model.student.path: its experts have an auxiliary load-balancing loss (router_aux_loss_coef: {weight} in its "
        "config). This loss is not used, even with output_router_logits: the routers are trained by the objectives alone."
    )
