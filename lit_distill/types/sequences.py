"""Texts with their targets and signals, and pairs of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.functional import PackedRows, pack_rows
from lit_distill.functional.host import HostMasks, to_device


@dataclass(frozen=True)
class TensorRecord:
    """A dataclass of tensors that is moved between devices as a whole."""

    def _map(self, move: Any) -> Self:
        def apply(value: Any) -> Any:
            if isinstance(value, Tensor | TensorRecord):
                return move(value)
            if isinstance(value, Mapping):
                return {key: apply(item) for key, item in value.items()}
            return value

        return replace(self, **{f.name: apply(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Self:
        """The same record with every tensor on ``device``. Copies to a GPU are asynchronous by default, unlike Lightning's."""
        if non_blocking is None:
            non_blocking = torch.device(device).type == "cuda"
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same record in page-locked memory, so that copies to a GPU overlap with compute."""
        return self._map(lambda value: value.pin_memory())


class Item(NamedTuple):
    """What is known of the item that a text was made from."""

    id: str
    fields: Mapping[str, str] = MappingProxyType({})
    """Fields of its record that the teacher asks for, by name."""


@dataclass(frozen=True)
class Sequences(TensorRecord):
    """Token sequences padded to one length, with a value of every signal for each token.

    Entry t of every field belongs to token t. `lit_distill.models` alone shifts logits against targets.

    Example:
        Two sequences of a prompt (5 6) and a response that ends with EOS = 2; the second response is one token shorter::

            input_ids       [[5, 6, 7, 2], [5, 6, 2, 0]]
            attention_mask  [[1, 1, 1, 1], [1, 1, 1, 0]]
            target_mask     [[F, F, T, T], [F, F, T, F]]
            signals         {"advantages": [[0, 0, 0.3, -0.1], [0, 0, 0.2, 0]]}
    """

    input_ids: Tensor
    """[B, S] int64: prompt and response, or plain text."""
    attention_mask: Tensor
    """[B, S] int64: 1 for a token, 0 for padding on either side."""
    target_mask: Tensor
    """[B, S] bool: the tokens that the loss is computed on. Column 0 is always False: no token predicts it."""
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    """[B, S] float32 each: values that a rollout recorded for every token, by name."""

    teacher_hidden: Tensor | None = None
    """[B, T, H] or None: the teacher's hidden states that predict the last T tokens, recorded during generation; they may be in
    host memory. The teacher's LM head turns them into logits, so its body need not run again."""

    items: tuple[Item, ...] = ()
    """The item of every text; empty for texts without items, such as a corpus."""

    _host_masks: ClassVar[HostMasks | None] = None  # of an instance, but no field: it is neither copied nor saved

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def masks(self) -> HostMasks:
        """Both masks on the host. Only masks that were made on a GPU have to be waited for, once."""
        known = self._host_masks
        if known is None or not known.describe(self.attention_mask, self.target_mask):
            known = HostMasks.read(self.attention_mask, self.target_mask)
            object.__setattr__(self, "_host_masks", known)
        return known

    @property
    def tokens_on_host(self) -> Tensor:
        """[B, S] int64 on the CPU: the token ids. Only those that were made on a GPU have to be waited for."""
        known = self.masks.tokens
        return self.input_ids.cpu() if known is None else known

    @property
    def target_index(self) -> Tensor:
        """[N] int64: index of every target in the flattened ``[B · S]`` tokens.

        Raises:
            ValueError: if a token of column 0 is a target.
        """
        return self.masks.target_index

    @cached_property
    def packed(self) -> PackedRows | None:
        """The same texts in rows with less padding, for models that keep the texts of a row apart; None if there is no gain."""
        return pack_rows(self.input_ids, self.masks.attended)

    @cached_property
    def packed_in_one_row(self) -> PackedRows | None:
        """The same texts in one row, for attention kernels that know documents there only; None if there is no padding."""
        return pack_rows(self.input_ids, self.masks.attended, one_row=True)

    def packed_index(self, packed: PackedRows) -> Tensor:
        """[N] int64: index in the flattened ``packed`` rows of the token that predicts each target."""
        return to_device(packed.places[:, :-1][self.masks.targets[:, 1:]], self.input_ids.device)

    def recorded_index(self, recorded: Tensor) -> Tensor:
        """[N] int64: index of every target in a flattened recording ``[B, T, ...]`` of the last T tokens, on its device."""
        return to_device(self.masks.targets[:, -recorded.shape[1] :].flatten().nonzero()[:, 0], recorded.device)

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Self:
        """The same sequences on ``device``; the host remembers the masks. See `TensorRecord.to`."""
        moved = super().to(device, non_blocking)
        on_host = self.input_ids.device.type == "cpu"
        return moved._with_masks(self.masks.attended, self.masks.targets, self.input_ids) if on_host else moved

    def _with_masks(self, attended: Tensor, targets: Tensor, tokens: Tensor | None) -> Self:
        known = HostMasks.known(attended, targets, self.attention_mask, self.target_mask, tokens)
        object.__setattr__(self, "_host_masks", known)
        return self

    def slice(self, start: int, stop: int) -> Sequences:
        """Sequences ``start`` to ``stop``, without the columns that are padding in all of them."""
        attended = self.masks.attended[start:stop]
        used = attended.any(dim=0).tolist()
        first, last = (used.index(True), len(used) - used[::-1].index(True)) if True in used else (0, 1)
        hidden = self.teacher_hidden
        if hidden is not None:  # it covers the last T columns; none of them is left of the prompt's end
            hidden = hidden[start:stop, : hidden.shape[1] - (attended.shape[1] - last)]
        part = Sequences(
            input_ids=self.input_ids[start:stop, first:last],
            attention_mask=self.attention_mask[start:stop, first:last],
            target_mask=self.target_mask[start:stop, first:last],
            signals={name: signal[start:stop, first:last] for name, signal in self.signals.items()},
            teacher_hidden=hidden,
            items=self.items[start:stop],
        )
        tokens = self.masks.tokens
        return part._with_masks(
            attended[:, first:last],
            self.masks.targets[start:stop, first:last],
            None if tokens is None else tokens[start:stop, first:last],
        )

    def without_targets(self) -> Sequences:
        """The same sequences without targets. A rank that has run out of data uses them to keep collectives in step."""
        blank = replace(self, target_mask=torch.zeros_like(self.target_mask))
        return blank._with_masks(self.masks.attended, torch.zeros_like(self.masks.targets), self.masks.tokens)

    def with_targets(self, targets: Tensor) -> Sequences:
        """The same sequences with other targets, ``[B, S]`` bool on the CPU; none of them in column 0."""
        changed = replace(self, target_mask=to_device(targets, self.input_ids.device))
        return changed._with_masks(self.masks.attended, targets, self.masks.tokens)

    def without_recording(self) -> Sequences:
        """The same sequences without the teacher's hidden states, for another model than that teacher."""
        if self.teacher_hidden is None:
            return self
        plain = replace(self, teacher_hidden=None)
        return plain._with_masks(self.masks.attended, self.masks.targets, self.masks.tokens)

    def select(self, index: Tensor) -> Sequences:
        """The sequences at ``index`` ``[b]`` int64 on the CPU, in that order."""
        rows = index.cpu()

        def pick(values: Tensor) -> Tensor:
            return values[to_device(rows, values.device)]

        chosen = Sequences(
            input_ids=pick(self.input_ids),
            attention_mask=pick(self.attention_mask),
            target_mask=pick(self.target_mask),
            signals={name: pick(signal) for name, signal in self.signals.items()},
            teacher_hidden=None if self.teacher_hidden is None else pick(self.teacher_hidden),
            items=tuple(self.items[row] for row in rows.tolist()) if self.items else (),
        )
        tokens = self.masks.tokens
        return chosen._with_masks(
            self.masks.attended[rows], self.masks.targets[rows], None if tokens is None else tokens[rows]
        )


@dataclass(frozen=True)
class Pairs(TensorRecord):
    """A chosen and a rejected response for each prompt; row i of both has the same prompt.

    Example:
        Two pairs with the prompt (5 6); the rejected responses are (9 2) and (8 9 2)::

            chosen.input_ids      [[5, 6, 7, 2], [5, 6, 2, 0]]
            rejected.input_ids    [[5, 6, 9, 2, 0], [5, 6, 8, 9, 2]]
            rejected.target_mask  [[F, F, T, T, F], [F, F, T, T, T]]
    """

    chosen: Sequences
    """[B, S]."""
    rejected: Sequences
    """[B, S']."""

    def __len__(self) -> int:
        return len(self.chosen)

    def slice(self, start: int, stop: int) -> Pairs:
        """Pairs ``start`` to ``stop``, without the columns that are padding in all of them."""
        return Pairs(self.chosen.slice(start, stop), self.rejected.slice(start, stop))

    def without_targets(self) -> Pairs:
        """The same pairs without targets; they add nothing to a loss."""
        return Pairs(self.chosen.without_targets(), self.rejected.without_targets())

    def select(self, index: Tensor) -> Pairs:
        """The pairs at ``index`` ``[b]`` int64, in that order."""
        return Pairs(self.chosen.select(index), self.rejected.select(index))

    def concatenate(self) -> Sequences:
        """All chosen, then all rejected sequences, ``[2B, max(S, S')]``; recorded hidden states are left out."""
        width = max(self.chosen.input_ids.shape[1], self.rejected.input_ids.shape[1])

        def join(*values: Tensor) -> Tensor:
            return torch.cat([F.pad(v, (0, width - v.shape[1])) for v in values])

        chosen, rejected = self.chosen, self.rejected
        text = Sequences(
            input_ids=join(chosen.input_ids, rejected.input_ids),
            attention_mask=join(chosen.attention_mask, rejected.attention_mask),
            target_mask=join(chosen.target_mask, rejected.target_mask),
            signals={name: join(chosen.signals[name], rejected.signals[name]) for name in chosen.signals},
            items=chosen.items + rejected.items,
        )
        return text._with_masks(
            join(chosen.masks.attended, rejected.masks.attended),
            join(chosen.masks.targets, rejected.masks.targets),
            None,
        )
