"""What travels between the stages: plain frozen dataclasses, a shape and a sentence under every field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TensorRecord:
    """A dataclass of tensors that moves between devices as one."""

    def _map(self, move: Any) -> Self:
        def apply(value: Any) -> Any:
            if isinstance(value, Tensor | TensorRecord):
                return move(value)
            if isinstance(value, Mapping):
                return {key: apply(item) for key, item in value.items()}
            return value

        return replace(self, **{f.name: apply(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Self:
        """The same record with every tensor on ``device``; by default nobody waits for a copy to a GPU, as Lightning would."""
        if non_blocking is None:
            non_blocking = torch.device(device).type == "cuda"
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same record in page-locked memory, so that copies to a GPU overlap with compute."""
        return self._map(lambda value: value.pin_memory())


@dataclass(frozen=True)
class Sequences(TensorRecord):
    """Texts padded to one length, with what is known about each of their tokens.

    Entry t of every field speaks of token t; the shift from logits to targets happens in one place, in
    `lit_distill.models`.
    """

    input_ids: Tensor
    """[B, S] int64: prompt and response, or plain text."""
    attention_mask: Tensor
    """[B, S] int64: 1 for a token, 0 for padding on either side."""
    target_mask: Tensor
    """[B, S] bool: the tokens that objectives count. Column 0 is never one: nothing predicts it."""
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    """[B, S] float32 each: what a rollout recorded about every token, by name."""

    teacher_hidden: Tensor | None = None
    """[B, T, H] or None: the teacher's hidden rows that predict the last T tokens, recorded while they were
    written; perhaps in host memory. The teacher's head turns them into its logits, so its body need not run again."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def rows(self, start: int, stop: int) -> Sequences:
        """Texts ``start`` to ``stop``, without the columns that are padding in all of them."""
        mask = self.attention_mask[start:stop]
        used = mask.any(dim=0).tolist()  # once to the host, which then knows both ends
        first, last = (used.index(True), len(used) - used[::-1].index(True)) if True in used else (0, 1)
        hidden = self.teacher_hidden
        if hidden is not None:  # it covers the last T columns, none of which stand left of the prompt's end
            hidden = hidden[start:stop, : hidden.shape[1] - (mask.shape[1] - last)]
        return Sequences(
            input_ids=self.input_ids[start:stop, first:last],
            attention_mask=mask[:, first:last],
            target_mask=self.target_mask[start:stop, first:last],
            signals={name: signal[start:stop, first:last] for name, signal in self.signals.items()},
            teacher_hidden=hidden,
        )

    def uncounted(self) -> Sequences:
        """The same texts without targets: they count nowhere, and a rank that has no more may run them with the others."""
        return replace(self, target_mask=torch.zeros_like(self.target_mask))

    def select(self, index: Tensor) -> Sequences:
        """The texts at ``index`` ``[b]`` int64, in that order."""

        def pick(values: Tensor) -> Tensor:
            return values[index.to(values.device)]

        return Sequences(
            input_ids=pick(self.input_ids),
            attention_mask=pick(self.attention_mask),
            target_mask=pick(self.target_mask),
            signals={name: pick(signal) for name, signal in self.signals.items()},
            teacher_hidden=None if self.teacher_hidden is None else pick(self.teacher_hidden),
        )


@dataclass(frozen=True)
class Pairs(TensorRecord):
    """Two responses to each prompt, of which the first is to be preferred; row i of both answers the same prompt."""

    chosen: Sequences
    """[B, S]."""
    rejected: Sequences
    """[B, S']."""

    def __len__(self) -> int:
        return len(self.chosen)

    def rows(self, start: int, stop: int) -> Pairs:
        """Pairs ``start`` to ``stop``, without the columns that are padding in all of them."""
        return Pairs(self.chosen.rows(start, stop), self.rejected.rows(start, stop))

    def uncounted(self) -> Pairs:
        """The same pairs without targets, which count nowhere."""
        return Pairs(self.chosen.uncounted(), self.rejected.uncounted())

    def select(self, index: Tensor) -> Pairs:
        """The pairs at ``index`` ``[b]`` int64, in that order."""
        return Pairs(self.chosen.select(index), self.rejected.select(index))

    def both(self) -> Sequences:
        """All chosen, then all rejected texts, ``[2B, max(S, S')]``; recorded hidden rows are left out."""
        width = max(self.chosen.input_ids.shape[1], self.rejected.input_ids.shape[1])

        def join(*values: Tensor) -> Tensor:
            return torch.cat([F.pad(v, (0, width - v.shape[1])) for v in values])

        chosen, rejected = self.chosen, self.rejected
        return Sequences(
            input_ids=join(chosen.input_ids, rejected.input_ids),
            attention_mask=join(chosen.attention_mask, rejected.attention_mask),
            target_mask=join(chosen.target_mask, rejected.target_mask),
            signals={name: join(chosen.signals[name], rejected.signals[name]) for name in chosen.signals},
        )


@dataclass(frozen=True)
class Prompts(TensorRecord):
    """Prompts padded on the left, so that decoding continues all of them at the same column."""

    input_ids: Tensor
    """[B, P] int64."""
    attention_mask: Tensor
    """[B, P] int64: 0 for the padding on the left."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def rows(self, start: int, stop: int) -> Prompts:
        """Prompts ``start`` to ``stop``, with their padding."""
        return Prompts(self.input_ids[start:stop], self.attention_mask[start:stop])

    def select(self, rows: Sequence[int]) -> Prompts:
        """The prompts at ``rows``, with their padding."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.input_ids.device)
        return Prompts(self.input_ids[index], self.attention_mask[index])


@dataclass(frozen=True)
class Batch(TensorRecord):
    """What a data module yields for one step (or one phase of rollouts)."""

    ids: tuple[str, ...]
    """The items' ids, for messages, samples and predictions."""
    prompts: Prompts | None = None
    """The same items' prompts, ready for decoding; None where the step needs none."""
    sequences: Sequences | None = None
    """Prompt and response of every item, padded on the right; None for data without responses."""
    references: tuple[tuple[str, ...], ...] = ()
    """The accepted responses of every item, as text; at least one each where present."""
    prompt_texts: tuple[str, ...] = ()
    """The prompts as the model reads them, as text."""
    corpus: Sequences | None = None
    """Plain text packed to length, for the pre-training loss; None where no corpus is configured."""

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Sequence[int]) -> Batch:
        """The items at ``rows``, to be answered: without their sequences and corpus.

        Without rows there remains one prompt that counts nowhere, as for a rank without items.
        """
        return Batch(
            ids=tuple(self.ids[i] for i in rows),
            prompts=None if self.prompts is None else self.prompts.select(rows or [0]),
            references=tuple(self.references[i] for i in rows if self.references),
            prompt_texts=tuple(self.prompt_texts[i] for i in rows if self.prompt_texts),
        )
