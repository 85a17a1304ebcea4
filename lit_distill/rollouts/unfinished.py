"""A batch of several optimiser steps, and what is left of it where ``max_steps`` ends the run inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from lit_distill.types import Batch, Pairs, Sequences, TensorRecord

if TYPE_CHECKING:
    from lit_distill.parallel import DataRanks
    from lit_distill.rollouts.sources import Players, Source

Text = Sequences | Pairs


class Phase(NamedTuple):
    """The mini-batches of one batch."""

    ids: tuple[str, ...]
    """This rank's items."""
    texts: Iterator[Text]
    """What is left to learn from."""
    steps: int
    """Optimiser steps that the batch is good for."""
    done: int = 0
    """How many of them were taken before those of ``texts``."""


class UnfinishedPhase(NamedTuple):
    """The texts of the optimiser steps that a stop left out, in host memory; a run that goes on takes these steps first.

    They were written by the student of an earlier step, so they cannot be written again.
    """

    ids: tuple[str, ...]
    texts: list[Text]
    steps: int
    done: int
    batches: int
    """Of the run, the last of which this is."""

    @classmethod
    def of(cls, phase: Phase, done: int, batches: int) -> UnfinishedPhase | None:
        """What is left of ``phase`` after its first ``done`` steps."""
        texts: list[Text] = [text.to("cpu") for text in islice(phase.texts, phase.steps - done)]
        return cls(phase.ids, texts, phase.steps, done, batches) if texts else None

    def phase(self, device: Any) -> Phase:
        """To go on with."""
        return Phase(self.ids, (text.to(device) for text in self.texts), self.steps, self.done)

    def state(self, ranks: DataRanks, **made_by: Any) -> dict[str, Any]:
        """Plain values, equal on all ranks.

        Args:
            ranks: each of which has its own texts.
            made_by: what has to be the same in a run that is to go on with them.
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
        """This rank's share of what `state` gave; None for a run of other batches."""
        if state["made_by"] != {"ranks": ranks.number, **made_by}:
            return None
        mine = state["shares"][ranks.rank]
        texts = [_text(values) for values in mine["texts"]]
        return cls(tuple(mine["ids"]), texts, state["steps"], state["done"], state["batches"])


def phase_of(batch: Batch, source: Source, players: Players, left: UnfinishedPhase | None, device: Any) -> Phase:
    """What to learn from now that it is the turn of ``batch``: what a stop has left of it, or what the source makes of it."""
    if left is not None and left.ids == batch.ids:
        return left.phase(device)
    steps = source.steps_per_batch(len(batch) * players.world_size)
    return Phase(batch.ids, source.mini_batches(batch, players), steps)


def _plain(text: TensorRecord) -> dict[str, Any]:
    values = {field.name: getattr(text, field.name) for field in fields(text)}
    return {name: _plain(value) if isinstance(value, TensorRecord) else value for name, value in values.items()}


def _text(values: Mapping[str, Any]) -> Text:
    if "chosen" in values:
        return Pairs(Sequences(**values["chosen"]), Sequences(**values["rejected"]))
    return Sequences(**values)
