"""One model answers the prompts of a batch, for the sources in which student or teacher speaks alone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lit_distill.rollouts.decoding import Decoding, phase_uniforms
from lit_distill.rollouts.loop import decode
from lit_distill.rollouts.trajectories import Trajectories, join_responses

if TYPE_CHECKING:
    from lit_distill.models import CausalLM, FrozenTeacher
    from lit_distill.rollouts.sources import Players
    from lit_distill.types import Batch, Prompts


def prompts_of(batch: Batch, source: object) -> Prompts:
    """The batch's prompts.

    Raises:
        ValueError: naming the source, if there are none.
    """
    if batch.prompts is None:
        raise ValueError(f"model.source: {type(source).__name__} needs prompts, and the data module gives none.")
    return batch.prompts


def answers(
    speaker: CausalLM | FrozenTeacher,
    batch: Batch,
    prompts: Prompts,
    players: Players,
    decoding: Decoding,
    draws: tuple[int, int | str],
    decode_batch_size: int | None = None,
) -> Trajectories:
    """What ``speaker`` answers; a rank without items answers a prompt that counts nowhere.

    Args:
        speaker: student or teacher.
        batch: the items.
        prompts: of the batch.
        players: who takes part.
        decoding: how to draw.
        draws: seed and phase, which with an item's id fix its random numbers.
        decode_batch_size: responses decoded at a time; all at once by default.
    """
    start = time.perf_counter()
    size = decode_batch_size or len(prompts)
    parts = []
    for first in range(0, len(prompts), size):
        items = batch.ids[first : first + size]
        uniforms = phase_uniforms(*draws, items, decoding.max_new_tokens)
        part = decode(speaker, prompts.rows(first, first + size), decoding, players.stop_ids, uniforms)
        parts.append(part.counted(items))
    return Trajectories(
        ids=batch.ids,
        prompt_texts=batch.prompt_texts,
        prompts=prompts,
        responses=join_responses(parts),
        signals={},
        alpha=float(speaker is not players.student),
        seconds=time.perf_counter() - start,
    )
