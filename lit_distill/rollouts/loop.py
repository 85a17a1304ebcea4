"""The decode loop: one for training, evaluation and `predict`; finished rows leave the batch.

Teacher-mixed sampling draws y_t from αp + (1−α)q: throw a coin of chance α, at heads draw from p, else from q. The
coins do not depend on the text, so they are thrown first and shared by the rows of a decoding batch: whoever's turn it
is not need not even read. Each row's law is exactly the mixture; sharing coins correlates rows and leaves every mean
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_distill.rollouts.decoding import Decoding, draw
from lit_distill.rollouts.reader import Reader
from lit_distill.types import TensorRecord

if TYPE_CHECKING:
    from lit_distill.models import CausalLM, FrozenTeacher
    from lit_distill.types import Prompts

COMPACT_EVERY = 8
"""Steps between two looks at which rows have finished; each look waits for the device."""

WATCHERS: list[Callable[[int, int, int], None]] = []
"""Called with (step, max_new_tokens, rows still read) before every step of every decode loop of this process, and with
step = max_new_tokens when it is done. For progress bars: they must not wait for the device."""


@dataclass(frozen=True)
class Responses(TensorRecord):
    """What was answered, and how probable each token was."""

    ids: Tensor
    """[B, T] int64; 0 after the end."""
    mask: Tensor
    """[B, T] bool: up to and including the first end-of-sequence token. The decoder's own knowledge, never `ids != pad`."""
    logprobs: Tensor
    """[B, T] float32: log-probability of each token under the speaker (in a mixed rollout the student) at the temperature, before
    truncation; at 1 for greedy decoding; 0 after the end."""
    teacher_logprobs: Tensor | None = None
    """[B, T] float32: the same under the teacher, in a mixed rollout."""
    teacher_hidden: Tensor | None = None
    """[B, T, H]: the teacher's rows that predict each token, in a mixed rollout; its head alone scores them again."""
    from_teacher: Tensor | None = None
    """[B, T] bool: the tokens that the teacher wrote, in a mixed rollout."""
    student_entropy: Tensor | None = None
    """[B, T] float32 nats: of the student's distribution of each token, in a mixed rollout."""
    teacher_entropy: Tensor | None = None
    """[B, T] float32 nats: of the teacher's distribution of each token, in a mixed rollout."""

    def counted(self, items: Sequence[str]) -> Responses:
        """The same, or, where there are no items, a row that counts nowhere and keeps the ranks together."""
        return self if items else replace(self, mask=torch.zeros_like(self.mask))

    def finished(self, stop_ids: Sequence[int]) -> Tensor:
        """[B] bool: which responses ended by themselves, rather than at ``max_new_tokens``."""
        stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=self.ids.device)
        return (torch.isin(self.ids, stops) & self.mask).any(dim=-1)


def decode(
    speaker: CausalLM | FrozenTeacher,
    prompts: Prompts,
    decoding: Decoding,
    stop_ids: Sequence[int],
    uniforms: Tensor | None = None,
) -> Responses:
    """Continue prompts until each has said an end-of-sequence token or ``max_new_tokens``.

    Args:
        speaker: the model that speaks.
        prompts: ``[B, P]``, padded on the left.
        decoding: how to draw.
        stop_ids: the tokens that end a response.
        uniforms: ``[B, max_new_tokens]`` from `row_uniforms`; not needed at temperature 0.

    Raises:
        ValueError: if sampling is asked for without ``uniforms``.
    """
    ids, mask, readers = _converse([speaker], [0] * decoding.max_new_tokens, prompts, decoding, stop_ids, uniforms)
    return Responses(ids, mask, readers[0].logprobs[:, : ids.shape[1]] * mask)


def decode_mixed(
    student: CausalLM,
    teacher: FrozenTeacher,
    coins: Sequence[bool],
    prompts: Prompts,
    decoding: Decoding,
    stop_ids: Sequence[int],
    uniforms: Tensor,
) -> Responses:
    """A rollout in which the teacher speaks at heads and the student at tails, scored by both while it is decoded.

    Args:
        student: q.
        teacher: p.
        coins: ``max_new_tokens`` throws, true with chance α.
        prompts: ``[B, P]``, padded on the left.
        decoding: one temperature for both models.
        stop_ids: the tokens that end a response.
        uniforms: ``[B, max_new_tokens]`` from `row_uniforms`.
    """
    turns = [int(coin) for coin in coins]
    ids, mask, (first, second) = _converse([student, teacher], turns, prompts, decoding, stop_ids, uniforms)
    length = ids.shape[1]
    return Responses(
        ids,
        mask,
        first.logprobs[:, :length] * mask,
        second.logprobs[:, :length] * mask,
        None if second.hidden is None else second.hidden[:, :length],
        torch.tensor(turns[:length], dtype=torch.bool, device=ids.device) & mask,
        first.entropies[:, :length] * mask,
        second.entropies[:, :length] * mask,
    )


@torch.no_grad()
def _converse(
    speakers: Sequence[CausalLM | FrozenTeacher],
    turns: Sequence[int],
    prompts: Prompts,
    decoding: Decoding,
    stop_ids: Sequence[int],
    uniforms: Tensor | None,
) -> tuple[Tensor, Tensor, list[Reader]]:
    """Ids and mask ``[B, T]`` of texts whose token t speaker ``turns[t]`` wrote; and the readers, who have scored them."""
    if decoding.temperature > 0 and uniforms is None:
        raise ValueError("decode: sampling at temperature > 0 needs the rows' random numbers; see row_uniforms.")
    device, batch, steps = prompts.input_ids.device, len(prompts), decoding.max_new_tokens
    ids = torch.zeros(batch, steps, dtype=torch.int64, device=device)
    mask = torch.zeros(batch, steps, dtype=torch.bool, device=device)
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    numbers = torch.zeros(batch, steps, device=device) if uniforms is None else uniforms.to(device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    with ExitStack() as stack:
        for speaker in speakers:
            stack.enter_context(speaker.speaking())
        together = any(speaker.runs_together for speaker in speakers)
        partners = next((speaker.partners for speaker in speakers if speaker.partners is not None), None)
        mixed = len(speakers) > 1
        readers = [
            Reader(speaker, prompts, ids, decoding.temperature, measure_entropy=mixed, keep_hidden=mixed and index > 0)
            for index, speaker in enumerate(speakers)
        ]
        for step in range(steps):
            reader = readers[turns[step]]
            _tell_watchers(step, steps, len(reader.rows))
            logits = reader.next_logits(step)
            rows = reader.rows
            tokens = draw(logits, numbers[rows, step], decoding)
            if partners is not None:  # a tie that rounds apart would part them for ever
                torch.distributed.broadcast(tokens, group=partners, group_src=0)
            reader.record(step, logits, tokens)
            ids[rows, step] = tokens * alive[rows]
            mask[rows, step] = alive[rows]
            alive[rows] &= ~torch.isin(tokens, stops)
            if step - reader.looked_at >= COMPACT_EVERY:
                reader.keep(alive, step, at_least_one=together)
                if _agreed(alive.sum(), together) == 0:
                    break
        length = int(mask.sum(dim=-1).max()) if batch else 0
        longest = _agreed(torch.tensor(length, device=device), together)
        for reader in readers:
            reader.finish(longest)
    _tell_watchers(steps, steps, 0)
    return ids[:, :length], mask[:, :length], readers


def _agreed(count: Tensor, together: bool) -> int:
    """The largest ``[]`` count of all ranks, where none may run a model without the others; else this rank's own."""
    if together:
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
    return int(count)


def _tell_watchers(step: int, steps: int, rows: int) -> None:
    for watcher in WATCHERS:
        watcher(step, steps, rows)
