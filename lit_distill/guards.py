"""Gradients that are no numbers: they never reach the weights, and the run stops or goes on as it was told to.

A run that is to stop does not wait for a GPU: the gradients are looked at where they are and set to 0 there, and what was
seen is read when the loss is logged, or a checkpoint is saved. A run that is to skip such steps waits once a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_distill.parallel import gradient_norm, local_part

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule

MANY = 10
"""Steps in a row without a gradient, after which a run that skips them stops: it does not recover."""
SHOWN = 20


class DivergedError(ValueError):
    """The weights are of no use any more: what was saved before is better."""


class Seen(NamedTuple):
    """An optimiser step that nobody has looked at yet."""

    step: int
    ids: tuple[str, ...]
    bad: Tensor
    """[] bool on the device: whether the gradient was not finite."""


class NonFinite:
    """Keeps NaN and infinite gradients from the weights and remembers whose they were.

    Args:
        action: "stop" the run when that is seen, or "skip" the step, say so once, and count.

    Raises:
        ValueError: naming ``model.on_nonfinite``, if it is neither.
    """

    def __init__(self, action: Literal["stop", "skip"]) -> None:
        if action not in ("stop", "skip"):
            raise ValueError(f"model.on_nonfinite: expected stop or skip, got {action!r}.")
        self.action = action
        self.ids: tuple[str, ...] = ()
        """Of the batch that is being learnt from, on this rank."""
        self.skipped = 0
        self._in_a_row = 0
        self._seen: list[Seen] = []

    def gate(self, parameters: Iterable[Tensor], step: int) -> None:
        """Keep the gradients from the optimiser if one of them is not finite; on all ranks alike.

        Without any gradient an optimiser does nothing at all; with zeros it would go on by momentum and weight decay.
        """
        moved = [p for p in parameters if p.grad is not None]
        if not moved:
            return
        bad = ~torch.isfinite(gradient_norm([p.grad for p in moved if p.grad is not None]))
        self._seen.append(Seen(step, self.ids, bad))
        if self.action == "stop":
            for parameter in moved:
                assert parameter.grad is not None
                local_part(parameter.grad).masked_fill_(bad.to(parameter.grad.device), 0.0)
        elif bad:
            for parameter in moved:
                parameter.grad = None

    def look(self, module: DistillationModule, loss: Tensor | None = None) -> None:
        """Read what was seen since the last time.

        Raises:
            DivergedError: with the items of the batch on all ranks, if the run is to stop.
        """
        seen, self._seen = self._seen, []
        bad = torch.stack([entry.bad for entry in seen]).tolist() if seen else []
        steps = [entry for entry, is_bad in zip(seen, bad, strict=True) if is_bad]
        self._in_a_row = self._in_a_row + len(steps) if len(steps) == len(seen) else len(steps)
        self.skipped += len(steps)
        if loss is not None and not math.isfinite(value := float(loss)) and (self.action == "stop" or not steps):
            raise DivergedError(self._message(module, f"train/loss is {value}", module.global_step, self.ids))
        if steps and (self.action == "stop" or self._in_a_row >= MANY):
            what = "the gradient is not finite"
            if self.action == "skip":
                what = f"the last {self._in_a_row} gradients are not finite; now"
            raise DivergedError(self._message(module, what, steps[0].step, steps[0].ids))
        if steps and self.skipped == len(steps):
            rank_zero_warn(
                f"model.on_nonfinite: skip: the gradient of step {steps[0].step} is not finite and was left out; "
                "train/skipped_steps counts such steps."
            )

    def figures(self) -> dict[str, Tensor]:
        """How many steps were skipped, once there was one."""
        return {"train/skipped_steps": torch.tensor(float(self.skipped))} if self.skipped else {}

    def _message(self, module: DistillationModule, what: str, step: int, own: tuple[str, ...]) -> str:
        items: list[Any] = [own]
        if module.trainer.world_size > 1:
            items = [None] * module.data_ranks.number
            dist.all_gather_object(items, own, module.data_ranks.group)
        ids = [item for share in items for item in share]
        more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
        return (
            f"{what} at step {step}: the run has diverged. Lower model.optimizer.lr, set trainer.gradient_clip_val: 1.0, or look "
            "for broken items in the data; the last checkpoint is from before that step. "
            f"The batch was {', '.join(ids[:SHOWN])}{more}. To go on without such steps: model.on_nonfinite: skip."
        )
