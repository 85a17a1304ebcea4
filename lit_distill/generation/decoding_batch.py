"""The responses of one batch while they are generated, shared by the models that sample them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_distill.generation.sampling import Sample, SamplingParams, sample, token_logprobs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from lit_distill.types import Prompts


class DecodingBatch:
    """Tokens, masks and random numbers of B responses of up to T tokens, in tensors that stay where they are.

    Args:
        prompts: ``[B, P]``, padded on the left.
        sampling: temperature, truncation and longest response T.
        stop_ids: the tokens that end a response.
        uniforms: ``[B, T]`` from `row_uniforms`; not needed at temperature 0.
        group: ranks that generate the same responses together, by tensor parallelism; None if there are none.

    Raises:
        ValueError: if the temperature is > 0 and ``uniforms`` is None.
    """

    def __init__(
        self,
        prompts: Prompts,
        sampling: SamplingParams,
        stop_ids: Sequence[int],
        uniforms: Tensor | None,
        group: ProcessGroup | None = None,
    ) -> None:
        if sampling.temperature > 0 and uniforms is None:
            raise ValueError(
                "uniforms: temperature > 0 needs one random number per row and step. Pass those of row_uniforms."
            )
        shape, device = (len(prompts), sampling.max_new_tokens), prompts.input_ids.device
        self.prompts = prompts
        self.sampling = sampling
        self.ids = torch.zeros(shape, dtype=torch.int64, device=device)
        """[B, T] the tokens; 0 after the end of a response."""
        self.mask = torch.zeros(shape, dtype=torch.bool, device=device)
        """[B, T] which of them belong to a response."""
        self.active = torch.ones(shape[:1], dtype=torch.bool, device=device)
        """[B] which responses have not ended."""
        self.remaining = torch.arange(shape[0], device=device)
        """[r] the responses that had not ended when `look` was last called, in ascending order."""
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        """[1] the step that is being generated: for indexing without a wait, also in a captured pass."""
        self._uniforms = torch.zeros(shape, device=device) if uniforms is None else uniforms.to(device)
        self._group = group
        self._stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)

    def look(self) -> None:
        """Update `remaining`; waits for the device."""
        self.remaining = self.active.nonzero()[:, 0]

    def sample(self, rows: Tensor, logits: Tensor) -> Sample:
        """The next token of ``rows`` ``[b]``, from ``logits`` ``[b, V]`` that are divided by the temperature."""
        found = sample(logits, self._uniforms[rows, self.step], self.sampling)
        if self._group is None:
            return found
        # ranks that round a tie differently would continue with different tokens
        torch.distributed.broadcast(found.tokens, group=self._group, group_src=0)
        return Sample(found.tokens, token_logprobs(logits, found.tokens))

    def append(self, rows: Tensor, tokens: Tensor) -> None:
        """Write ``tokens`` ``[b]`` at this step into those of ``rows`` that have not ended."""
        active = self.active[rows]
        self.ids[rows, self.step] = tokens * active
        self.mask[rows, self.step] = active
        self.active[rows] = active & (tokens[:, None] != self._stops).all(dim=-1)
