"""Interfaces: a `Generator` generates responses, an `Engine` makes generators, a `DecodableModel` is a model that they can run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lit_distill.models.caching import ForwardFunction

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_distill.generation.sampling import SamplingParams
    from lit_distill.models import LMHead, ModelSpec
    from lit_distill.types import Prompts, Responses, Sequences


class Generator(Protocol):
    """Generates responses to prompts with one model."""

    exact: bool
    """Whether the same weights, keys and seed give bitwise the same response again, whatever other prompts are generated with it.

    A resumed run does not depend on it: the rest of a phase (`UnfinishedPhase`) and a replay buffer are stored, since the weights
    that generated them are gone."""

    @property
    def mixes_teacher(self) -> bool:
        """Whether the teacher can sample some of the tokens (`Decoder.generate_mixed`)."""
        ...

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
    def cuda_graphs(self) -> bool:
        """Whether the steps of decoding are captured as CUDA graphs."""
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

    def target_rows(self, sequences: Sequences) -> Tensor:
        """The hidden rows ``[N, H]`` that predict the N targets of ``sequences``, in their order."""
        ...

    def transformers_model(self, device: torch.device) -> AbstractContextManager[PreTrainedModel]:
        """Context in which code of transformers may generate with the model itself, on prompts of ``device``.

        It is in evaluation mode, and its weights have the dtype in which they are applied.
        """
        ...


class Engine(ABC):
    """Settings of another way to generate than the project's own decoder, under ``model.generator``.

    It generates all responses of one model. Where the teacher samples some of the tokens, the project's own decoder does.
    """

    @abstractmethod
    def check(self, student: ModelSpec, teacher: ModelSpec | None, sharded: bool) -> None:
        """Refuse models and strategies that the engine does not support, before any weights load.

        Args:
            student: the student's spec.
            teacher: the teacher's spec, or None.
            sharded: whether the strategy shards the models over the ranks.

        Raises:
            ValueError: with the argument or the key, what was given and what to do.
        """

    @abstractmethod
    def generator(
        self, model: DecodableModel, stop_ids: Sequence[int], on_step: Callable[[int, int, int], None] | None = None
    ) -> Generator:
        """The generator of one model.

        Args:
            model: the model that generates.
            stop_ids: the tokens that end a response.
            on_step: for progress bars, see `Decoder`.
        """
