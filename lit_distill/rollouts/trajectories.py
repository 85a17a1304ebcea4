"""A phase of rollouts with all that was recorded of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.rollouts.loop import Responses
from lit_distill.types import Prompts, Sequences, TensorRecord


@dataclass(frozen=True)
class Trajectories(TensorRecord):
    """Prompts, responses, and what is known of every response token; what callbacks are shown after each rollout."""

    ids: tuple[str, ...]
    """The items' ids."""
    prompt_texts: tuple[str, ...]
    """The prompts as text."""
    prompts: Prompts
    """[B, P], padded on the left."""
    responses: Responses
    """[B, T]."""
    signals: Mapping[str, Tensor]
    """[B, T] float32 each: old_logprobs, teacher_logprobs, advantages, importance_weights, single_step_weights, rewards."""
    alpha: float
    """Share of the teacher in the sampler."""
    seconds: float
    """Wall time of decoding."""

    def sequences(self) -> Sequences:
        """Prompt and response as one text ``[B, P + T]`` whose targets are the response's tokens."""
        prompt, mask = self.prompts, self.responses.mask
        width = prompt.input_ids.shape[1]
        return Sequences(
            input_ids=torch.cat([prompt.input_ids, self.responses.ids], dim=-1),
            attention_mask=torch.cat([prompt.attention_mask, mask.long()], dim=-1),
            target_mask=F.pad(mask, (width, 0)),
            signals={name: F.pad(values, (width, 0)) for name, values in self.signals.items()},
            teacher_hidden=self.responses.teacher_hidden,
        )


def join_responses(parts: Sequence[Responses]) -> Responses:
    """Responses of several decoding batches as one, padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    length = max(part.ids.shape[1] for part in parts)

    def join(values: Sequence[Tensor | None]) -> Any:
        present = [v for v in values if v is not None]
        if not present:
            return None
        return torch.cat([F.pad(v, (0, 0) * (v.ndim - 2) + (0, length - v.shape[1])) for v in present])

    return Responses(**{f.name: join([getattr(part, f.name) for part in parts]) for f in fields(Responses)})
