"""A batch of several optimiser steps, and its remaining steps if ``max_steps`` ends the run in the middle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from lit_distill.sources import checked
from lit_distill.types import Batch, Item, Pairs, Sequences, TensorRecord

if TYPE_CHECKING:
    from lit_distill.distributed import DataRanks
    from lit_distill.sources import RolloutContext, Source

Text = Sequences | Pairs


class Phase(NamedTuple):
    """The mini-batches of one batch."""

    ids: tuple[str, ...]
    """This rank's items."""
    texts: Iterator[Text]
    """The mini-batches that remain to be trained on."""
    steps: int
    """Optimiser steps of the batch."""
    done: int = 0
    """How many of these steps were done before ``texts``."""


class UnfinishedPhase(NamedTuple):
    """The texts of the optimiser steps that a stop left undone, in host memory; a resumed run does these steps first.

    The student of an earlier step generated them, so they cannot be generated again.
    """

    ids: tuple[str, ...]
    texts: list[Text]
    steps: int
    done: int
    batches: int
    """Number of batches of the run, including this one."""

    @classmethod
    def of(cls, phase: Phase, done: int, batches: int) -> UnfinishedPhase | None:
        """The rest of ``phase`` after its first ``done`` steps; None if nothing is left."""
        texts: list[Text] = [text.to("cpu") for text in islice(phase.texts, phase.steps - done)]
        return cls(phase.ids, texts, phase.steps, done, batches) if texts else None

    def phase(self, device: Any) -> Phase:
        """The phase to continue with."""
        return Phase(self.ids, (text.to(device) for text in self.texts), self.steps, self.done)

    def state(self, ranks: DataRanks, **made_by: Any) -> dict[str, Any]:
        """The state as plain values, equal on all ranks.

        Args:
            ranks: the data ranks, each with its own texts.
            made_by: settings that must be the same in a resumed run.
        """
        mine = {"ids": list(self.ids), "texts": [_plain(text) for text in self.texts]}
        shares: list[Any] = [mine]
        if ranks.number > 1:
            shares = [None] * ranks.number
            dist.all_gather_object(shares, mine, ranks.group)
        return {
            "shares": shares,
            "steps": self.steps,
            "done": self.done,
            "batches": self.batches,
            "made_by": {"ranks": ranks.number, **made_by},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], ranks: DataRanks, **made_by: Any) -> UnfinishedPhase | None:
        """This rank's part of a `state`; None if the settings of the batches have changed."""
        if state["made_by"] != {"ranks": ranks.number, **made_by}:
            return None
        mine = state["shares"][ranks.rank]
        texts = [_text(values) for values in mine["texts"]]
        return cls(tuple(mine["ids"]), texts, state["steps"], state["done"], state["batches"])


def phase_of(batch: Batch, source: Source, context: RolloutContext, left: UnfinishedPhase | None, device: Any) -> Phase:
    """The mini-batches of ``batch``: those that a stop left undone, or new ones from the source."""
    if left is not None and left.ids == batch.ids:
        return left.phase(device)
    steps = source.steps_per_batch(len(batch) * context.world_size)
    return Phase(batch.ids, checked(source, source.mini_batches(batch, context), steps), steps)


def _plain(text: TensorRecord) -> dict[str, Any]:
    values = {field.name: getattr(text, field.name) for field in fields(text)}
    if isinstance(text, Sequences):
        values["items"] = [[item.id, dict(item.fields)] for item in text.items]
    return {name: _plain(value) if isinstance(value, TensorRecord) else value for name, value in values.items()}


def _text(values: Mapping[str, Any]) -> Text:
    if "chosen" in values:
        return Pairs(_sequences(values["chosen"]), _sequences(values["rejected"]))
    return _sequences(values)


def _sequences(values: Mapping[str, Any]) -> Sequences:
    items = tuple(Item(name, known) for name, known in values.get("items", ()))  # older checkpoints have none
    return Sequences(**{**values, "items": items})
