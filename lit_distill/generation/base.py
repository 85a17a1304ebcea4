"""Two interfaces: a `Generator` generates responses; a `DecodableModel` is a model that `Decoder` can run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch.distributed import ProcessGroup

from lit_distill.models.caching import ForwardFunction

if TYPE_CHECKING:
    from lit_distill.generation.sampling import SamplingParams
    from lit_distill.models import LMHead
    from lit_distill.types import Prompts, Responses


class Generator(Protocol):
    """Generates responses to prompts with one model."""

    exact: bool
    """Whether the same weights, keys and seed give bitwise the same response again. If not, a checkpoint has to store the responses
    that are still needed."""
    mixes_teacher: bool
    """Whether the teacher can sample some of the tokens (`Decoder.generate_mixed`)."""

    def generate(self, prompts: Prompts, keys: Sequence[str], sampling: SamplingParams, seed: int) -> Responses:
        """Generate one response per prompt, with the log-probability of each token under the model that generated it.

        Args:
            prompts: ``[B, P]``, padded on the left.
            keys: one per prompt; a response depends on ``seed`` and its key, not on the other rows of the batch.
            sampling: temperature, truncation and longest response.
            seed: seed of all random numbers.
        """
        ...

    def sync(self, step: int) -> None:
        """Update the generator's weights to those after optimiser step ``step``."""
        ...


class DecodableModel(ForwardFunction, Protocol):
    """A causal language model that can generate: a student or a local teacher."""

    @property
    def config(self) -> Any:
        """The model's transformers config."""
        ...

    @property
    def forward_is_collective(self) -> bool:
        """Whether every forward pass needs all ranks to take part."""
        ...

    @property
    def tensor_parallel_group(self) -> ProcessGroup | None:
        """The ranks that share each block by tensor parallelism, or None."""
        ...

    def decoding_head(self) -> LMHead:
        """The LM head without gradient, in the dtype in which it is applied."""
        ...

    def generation_mode(self) -> AbstractContextManager[None]:
        """Context for generation: no dropout, and weights are gathered if that saves communication."""
        ...
