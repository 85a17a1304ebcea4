"""The narrow interface to transformers' continuous batching: token ids in, token ids out. Import it only where the engine runs.

Requests are all added before the engine starts, and the size of its cache follows from them. So the batches that it makes are the
same each time, whatever the free memory and the speed of the machine. Nothing is kept between two calls: each one makes a new
manager and a new cache, so the weights are those of the moment.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POLL_SECONDS = 1.0
"""Time between two checks that the engine's thread is alive."""


class Sizes(NamedTuple):
    """Sizes of the engine's cache and batches, in tokens."""

    page: int
    cache: int | None
    """None: all texts at once."""
    batch: int


class SampleRows(ContinuousBatchingLogitsProcessor):
    """Lets the project sample each token, from the tokens that the project knows.

    The engine takes the argmax of what this returns: the logits of the first ``vocabulary_size`` tokens or, with ``sample``, the
    token that ``sample`` returns alone.

    Args:
        lengths: tokens of each prompt, by the request's number.
        max_new_tokens: tokens of the longest response.
        vocabulary_size: number of tokens that may be generated.
        sample: called with logits ``[n, V]`` float32, rows ``[n]`` and steps ``[n]`` int64; returns tokens ``[n]``. None is greedy.
    """

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 - as the base class declares it
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(
        self,
        lengths: Sequence[int],
        max_new_tokens: int,
        vocabulary_size: int,
        sample: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    ) -> None:
        self.lengths = lengths
        self.max_new_tokens = max_new_tokens
        self.vocabulary_size = vocabulary_size
        self.sample = sample

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Row 0, step 0."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Row and step of every request that gets a token, as one number."""
        places = []
        for state in (request.state for request in requests_with_new_token):
            row = int(state.request_id)
            # a request that was evicted from the cache has some of its response among its initial tokens
            step = len(state.initial_tokens) + len(state.generated_tokens) - self.lengths[row]
            places.append(row * self.max_new_tokens + step)
        return torch.tensor(places, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Scores ``[n, rows of the head]`` of which the argmax is the token."""
        logits = scores[:, : self.vocabulary_size]
        masked = torch.full_like(scores, -torch.inf)
        if self.sample is None:
            masked[:, : self.vocabulary_size] = logits
            return masked
        places = tensor_arg[: len(scores)].long()
        tokens = self.sample(logits, places // self.max_new_tokens, places % self.max_new_tokens)
        return masked.scatter(-1, tokens[:, None], 0.0)


def generate_paged(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampler: SampleRows,
    stop_ids: Sequence[int],
    sizes: Sizes,
    on_finished: Callable[[int], None],
) -> list[Any]:
    """Generate one response per prompt with the engine, in the order of the prompts.

    Args:
        model: in evaluation mode; its attention implementation is the same afterwards.
        prompts: token ids without padding.
        sampler: chooses the tokens.
        stop_ids: the tokens that end a response.
        sizes: of cache and batches.
        on_finished: called with the number of responses that are finished.

    Returns:
        ``GenerationOutput`` of transformers, with ``generated_tokens`` and their ``logprobs``, which mean something if the sampler
        is greedy.

    Raises:
        RuntimeError: if the engine failed.
    """
    pages = [-(-(len(prompt) + sampler.max_new_tokens) // sizes.page) for prompt in prompts]
    blocks = sum(pages) if sizes.cache is None else min(sum(pages), max(sizes.cache // sizes.page, *pages))
    settings = ContinuousBatchingConfig(
        page_size=sizes.page,
        num_blocks=blocks,
        max_batch_tokens=max(16, min(sizes.batch, max(sum(map(len, prompts)), len(prompts)))),
        use_async_batching=False,  # SampleRows needs the tokens of a step before the next one
        use_cuda_graph=False,  # a graph is captured anew at each call
        auto_switch_to_flash=False,
        return_logprobs=sampler.sample is None,
        seed=0,  # of torch's generator, which nothing uses and `_own_random_state` restores
    )
    eos = sorted(stop_ids) or [-1]
    with _same_attention(model), _own_random_state(model.device), _quick_collections(), _quiet():
        owner: Any = model  # the type of a module's attributes hides this method
        manager = owner.init_continuous_batching(GenerationConfig(do_sample=False, eos_token_id=eos), settings)
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
        processors.tensors_required = 1
        manager.logit_processor = processors
        for row, prompt in enumerate(prompts):
            manager.add_request(
                list(prompt), request_id=str(row), max_new_tokens=sampler.max_new_tokens, eos_token_id=eos
            )
        finished: dict[int, Any] = {}
        failure: str | None = None
        manager.start()
        try:
            while len(finished) < len(prompts) and failure is None:
                output = manager.get_result(timeout=POLL_SECONDS)
                if output is None:
                    failure = None if manager.is_running() else "its thread has ended"
                elif output.error is not None:
                    failure = output.error
                else:
                    finished[int(output.request_id)] = output
                    on_finished(len(finished))
        finally:
            manager.stop(hard_stop=len(finished) < len(prompts))
            manager.destroy()
        if failure is not None:
            raise RuntimeError(failure) from manager.background_thread_status.fatal_error
    return [finished[row] for row in range(len(prompts))]


@contextmanager
def _same_attention(model: PreTrainedModel) -> Iterator[None]:
    """Give the model its attention implementation back: the engine does so only if it has started."""
    before = model.config._attn_implementation
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Keep torch's random state: the engine seeds torch."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Let garbage collection skip the objects that exist already: the engine collects twice when it stops, 0.4 s each otherwise."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the engine from logging the traceback of an error that is raised anyway."""
    log = logging.getLogger("ContinuousBatchingLogger")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
