"""Data passed between data module, sources, models and objectives, and the errors of their arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.functional import PackedRows, pack_rows
from lit_distill.functional.host import HostMasks, to_device


class ArgumentError(ValueError):
    """An argument of an object turned out to be wrong after the object was made; constructors raise a plain ValueError.

    Args:
        owner: the object that was given the argument. The command line puts the object's YAML key in front of the message.
        message: begins with the argument's name, as in ``alpha: expected ...``, or with what is wrong with the object.
    """

    def __init__(self, owner: object, message: str) -> None:
        super().__init__(message)
        self.owner = owner


@contextmanager
def arguments_of(owner: object) -> Iterator[None]:
    """Turn a ValueError whose message begins with an argument of ``owner``, or with its class, into an `ArgumentError`."""
    try:
        yield
    except ArgumentError:
        raise
    except ValueError as error:
        if not (begins_with_argument(str(error), type(owner)) or str(error).startswith(type(owner).__name__)):
            raise
        raise ArgumentError(owner, str(error)) from error


def begins_with_argument(message: str, kind: type) -> bool:
    """Whether the first word of a message is an argument of a class, or of one of its base classes."""
    word = re.match(r"\w*", message)
    constructors = [vars(base)["__init__"] for base in kind.__mro__[:-1] if "__init__" in vars(base)]
    return word is not None and any(word[0] in inspect.signature(made).parameters for made in constructors)


def check_sizes(**sizes: int | None) -> None:
    """Refuse arguments below 1; None stands for a default.

    Raises:
        ValueError: with the name of the argument.
    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}.")


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
        return moved._with_masks(self.masks.attended, self.masks.targets) if on_host else moved

    def _with_masks(self, attended: Tensor, targets: Tensor) -> Self:
        known = HostMasks.known(attended, targets, self.attention_mask, self.target_mask)
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
        )
        return part._with_masks(attended[:, first:last], self.masks.targets[start:stop, first:last])

    def without_targets(self) -> Sequences:
        """The same sequences without targets. A rank that has run out of data uses them to keep collectives in step."""
        blank = replace(self, target_mask=torch.zeros_like(self.target_mask))
        return blank._with_masks(self.masks.attended, torch.zeros_like(self.masks.targets))

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
        )
        return chosen._with_masks(self.masks.attended[rows], self.masks.targets[rows])


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
        )
        return text._with_masks(
            join(chosen.masks.attended, rejected.masks.attended),
            join(chosen.masks.targets, rejected.masks.targets),
        )


@dataclass(frozen=True)
class Prompts(TensorRecord):
    """Prompts padded on the left, so that the first response token of every row has the same column.

    Example:
        A prompt of three tokens and one of two::

            input_ids       [[5, 6, 7], [0, 5, 6]]
            attention_mask  [[1, 1, 1], [0, 1, 1]]
    """

    input_ids: Tensor
    """[B, P] int64."""
    attention_mask: Tensor
    """[B, P] int64: 0 for the padding on the left."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def slice(self, start: int, stop: int) -> Prompts:
        """Prompts ``start`` to ``stop``, with their padding."""
        return Prompts(self.input_ids[start:stop], self.attention_mask[start:stop])

    def select(self, rows: Sequence[int]) -> Prompts:
        """The prompts at ``rows``, with their padding."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.input_ids.device)
        return Prompts(self.input_ids[index], self.attention_mask[index])


@dataclass(frozen=True)
class Batch(TensorRecord):
    """One batch of a data module: the items of one optimiser step, or of one phase of rollouts."""

    ids: tuple[str, ...]
    """Ids of the items, for messages, logged samples and predictions."""
    prompts: Prompts | None = None
    """Prompts of the items, padded for decoding; None if the step needs no prompts."""
    sequences: Sequences | None = None
    """Prompt and response of every item, padded on the right; None for data without responses."""
    references: tuple[tuple[str, ...], ...] = ()
    """Reference responses of every item as strings, none for some; empty if no item has one. Read them through `accepted`."""
    prompt_texts: tuple[str, ...] = ()
    """The prompts as strings, as given to the model."""
    corpus: Sequences | None = None
    """Plain text packed to a fixed length, for the pre-training loss; None if no corpus is configured."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def accepted(self) -> tuple[tuple[str, ...], ...]:
        """The reference responses of every item, also of a batch, or of a rank's share of it, in which none has one."""
        return self.references or ((),) * len(self)

    def select(self, rows: Sequence[int]) -> Batch:
        """The items at ``rows`` for generation, without their sequences and the corpus.

        If ``rows`` is empty, one dummy prompt without an id remains, as for a rank without items.
        """
        return Batch(
            ids=tuple(self.ids[i] for i in rows),
            prompts=None if self.prompts is None else self.prompts.select(rows or [0]),
            references=tuple(self.references[i] for i in rows if self.references),
            prompt_texts=tuple(self.prompt_texts[i] for i in rows if self.prompt_texts),
        )


@dataclass(frozen=True)
class Responses(TensorRecord):
    """Generated responses, with the log-probability of each token.

    Example:
        Two responses with EOS = 2; the second ended after one token::

            ids       [[7, 2], [2, 0]]
            mask      [[T, T], [T, F]]
            logprobs  [[-0.7, -0.1], [-1.2, 0]]
    """

    ids: Tensor
    """[B, T] int64; 0 after the end of a response."""
    mask: Tensor
    """[B, T] bool: up to and including the first end-of-sequence token. The decoder records it; `ids != pad` would be wrong for a
    response that contains the padding token."""
    logprobs: Tensor
    """[B, T] float32: log-probability of each token under the model that generated it (mixed rollout: under the student), at the
    sampling temperature (greedy decoding: 1) and before top-k and top-p; 0 after the end."""
    teacher_logprobs: Tensor | None = None
    """[B, T] float32: the same under the teacher, for a mixed rollout."""
    teacher_hidden: Tensor | None = None
    """[B, T, H]: the teacher's hidden states that predict each token, for a mixed rollout; its LM head alone gives the logits."""
    from_teacher: Tensor | None = None
    """[B, T] bool: the tokens that the teacher sampled, for a mixed rollout."""
    student_entropy: Tensor | None = None
    """[B, T] float32 nats: entropy of the student's distribution of each token, for a mixed rollout."""
    teacher_entropy: Tensor | None = None
    """[B, T] float32 nats: entropy of the teacher's distribution of each token, for a mixed rollout."""

    def masked_if_dummy(self, items: Sequence[str]) -> Responses:
        """The same responses; with an all-False mask if there are no ``items``, since the only row is then a dummy."""
        return self if items else replace(self, mask=torch.zeros_like(self.mask))

    def finished(self, stop_ids: Sequence[int]) -> Tensor:
        """[B] bool: which responses ended with a stop token rather than at ``max_new_tokens``."""
        stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=self.ids.device)
        return (torch.isin(self.ids, stops) & self.mask).any(dim=-1)


@dataclass(frozen=True)
class Trajectories(TensorRecord):
    """Prompts, responses and the signals of every response token; callbacks receive it after each rollout.

    Example:
        Two prompts of two tokens, with responses of up to two tokens (EOS = 2)::

            ids                 ("item-0", "item-1")
            prompts.input_ids   [[5, 6], [0, 5]]
            responses.ids       [[7, 2], [2, 0]]
            responses.logprobs  [[-0.7, -0.1], [-1.2, 0]]
            signals             {"advantages": [[0.3, -0.1], [0.2, 0]]}
            alpha               0.2
    """

    ids: tuple[str, ...]
    """Ids of the items."""
    prompt_texts: tuple[str, ...]
    """The prompts as strings."""
    prompts: Prompts
    """[B, P], padded on the left."""
    responses: Responses
    """[B, T]."""
    signals: Mapping[str, Tensor]
    """[B, T] float32 each: old_logprobs, teacher_logprobs, advantages, importance_weights, single_step_weights, rewards."""
    alpha: float
    """Share of the teacher in the sampler, in [0, 1]."""
    seconds: float
    """Wall-clock time of generation."""

    def sequences(self, needs: Collection[str] | None = None) -> Sequences:
        """Prompt and response as one sequence ``[B, P + T]`` whose targets are the response tokens.

        Args:
            needs: the signals to include; all by default.
        """
        signals = {name: values for name, values in self.signals.items() if needs is None or name in needs}
        return join_prompts(self.prompts, self.responses, signals)


def join_prompts(prompts: Prompts, responses: Responses, signals: Mapping[str, Tensor]) -> Sequences:
    """Prompts ``[B, P]`` and responses ``[B, T]`` as sequences ``[B, P + T]`` whose targets are the response tokens.

    Args:
        prompts: padded on the left.
        responses: to the prompts.
        signals: ``[B, T]`` each: values for the response tokens, by name.
    """
    width, mask = prompts.input_ids.shape[1], responses.mask
    return Sequences(
        input_ids=torch.cat([prompts.input_ids, responses.ids], dim=-1),
        attention_mask=torch.cat([prompts.attention_mask, mask.long()], dim=-1),
        target_mask=F.pad(mask, (width, 0)),
        signals={name: F.pad(values, (width, 0)) for name, values in signals.items()},
        teacher_hidden=responses.teacher_hidden,
    )


def join_responses(parts: Sequence[Responses]) -> Responses:
    """Concatenate the responses of several decoding batches, padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    length = max(part.ids.shape[1] for part in parts)

    def join(values: Sequence[Tensor | None]) -> Any:
        present = [v for v in values if v is not None]
        if not present:
            return None
        return torch.cat([F.pad(v, (0, 0) * (v.ndim - 2) + (0, length - v.shape[1])) for v in present])

    return Responses(**{f.name: join([getattr(part, f.name) for part in parts]) for f in fields(Responses)})
