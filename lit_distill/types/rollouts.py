"""Generated responses, and the trajectories that training makes of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.types.batch import Prompts
from lit_distill.types.sequences import Item, Sequences, TensorRecord


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
    items: tuple[Item, ...] = ()
    """Id and fields of every item, if they are known."""
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    """[B] float32 each: what the rewards of the user's own gave each response, without their weights, by name."""

    def sequences(self, needs: Collection[str] | None = None) -> Sequences:
        """Prompt and response as one sequence ``[B, P + T]`` whose targets are the response tokens.

        Args:
            needs: the signals to include; all by default.
        """
        signals = {name: values for name, values in self.signals.items() if needs is None or name in needs}
        return join_prompts(self.prompts, self.responses, signals, self.items)


def join_prompts(
    prompts: Prompts, responses: Responses, signals: Mapping[str, Tensor], items: tuple[Item, ...] = ()
) -> Sequences:
    """Prompts ``[B, P]`` and responses ``[B, T]`` as sequences ``[B, P + T]`` whose targets are the response tokens.

    Args:
        prompts: padded on the left.
        responses: to the prompts.
        signals: ``[B, T]`` each: values for the response tokens, by name.
        items: id and fields of every item, if they are known.
    """
    width, mask = prompts.input_ids.shape[1], responses.mask
    return Sequences(
        input_ids=torch.cat([prompts.input_ids, responses.ids], dim=-1),
        attention_mask=torch.cat([prompts.attention_mask, mask.long()], dim=-1),
        target_mask=F.pad(mask, (width, 0)),
        signals={name: F.pad(values, (width, 0)) for name, values in signals.items()},
        teacher_hidden=responses.teacher_hidden,
        items=items,
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
