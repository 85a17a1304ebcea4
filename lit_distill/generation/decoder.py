"""The project's own generator: one decode loop for training, evaluation and `predict`.

Teacher-mixed sampling samples each token from αp + (1−α)q (teacher p, student q). At each step the teacher samples the token
with probability α, else the student does. This choice does not depend on the tokens, so it is made in advance for all rows of
a decoding batch together, and a model does not run at the steps of the other model. Each row follows the mixture exactly. The
shared choice correlates the rows of a batch, but leaves every mean unchanged.

Rows that have ended are removed from the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from lit_distill.generation.base import DecodableModel
from lit_distill.generation.cached_decoder import CachedDecoder
from lit_distill.generation.decoding_batch import DecodingBatch
from lit_distill.generation.sampling import SamplingParams, row_uniforms
from lit_distill.models.replay import CudaCapture
from lit_distill.types import Prompts, Responses

LOOK_EVERY = {"cpu": 8}
"""Steps between two looks for finished rows, by device type; the default is 16, since each look waits for the device."""

ProgressHook = Callable[[int, int, int], None]
"""Called with (step, max_new_tokens, number of rows) before every step, and with step = max_new_tokens at the end. It must not
wait for the device."""


class Decoder:
    """A `Generator` that runs the model in this process, with a KV cache.

    Args:
        model: the model that generates.
        stop_ids: the tokens that end a response.
        teacher: the model that samples some of the tokens in `generate_mixed`.
        on_step: called before every step, for progress bars.
    """

    exact = True

    def __init__(
        self,
        model: DecodableModel,
        stop_ids: Sequence[int],
        teacher: DecodableModel | None = None,
        on_step: ProgressHook | None = None,
    ) -> None:
        self.model = model
        self.stop_ids = stop_ids
        self.teacher = teacher
        self.on_step = on_step

    @property
    def mixes_teacher(self) -> bool:
        """Whether there is a teacher."""
        return self.teacher is not None

    def sync(self, step: int) -> None:
        """Does nothing: the model is the same object that is trained."""

    def generate(self, prompts: Prompts, keys: Sequence[str], sampling: SamplingParams, seed: int) -> Responses:
        """See `Generator.generate`."""
        uniforms = None if sampling.temperature == 0 else row_uniforms(seed, keys, sampling.max_new_tokens)
        return generate(self.model, prompts, sampling, self.stop_ids, uniforms, self.on_step)

    def generate_mixed(
        self,
        prompts: Prompts,
        keys: Sequence[str],
        sampling: SamplingParams,
        seed: int,
        use_teacher: Sequence[bool],
        entropies: bool = False,
    ) -> Responses:
        """Generate with both models: the teacher samples token t if ``use_teacher[t]``; see `generate_mixed`."""
        assert self.teacher is not None
        uniforms = row_uniforms(seed, keys, sampling.max_new_tokens)
        models = (self.model, self.teacher)
        return generate_mixed(
            *models, use_teacher, prompts, sampling, self.stop_ids, uniforms, self.on_step, entropies=entropies
        )


def generate(
    model: DecodableModel,
    prompts: Prompts,
    sampling: SamplingParams,
    stop_ids: Sequence[int],
    uniforms: Tensor | None = None,
    on_step: ProgressHook | None = None,
) -> Responses:
    """Continue prompts until each has an end-of-sequence token or ``max_new_tokens`` tokens.

    Args:
        model: the model that generates.
        prompts: ``[B, P]``, padded on the left.
        sampling: temperature, truncation and longest response.
        stop_ids: the tokens that end a response.
        uniforms: ``[B, max_new_tokens]`` from `row_uniforms`; not needed at temperature 0.
        on_step: called before every step, for progress bars.

    Raises:
        ValueError: if the temperature is > 0 and ``uniforms`` is None.
    """
    steps = [0] * sampling.max_new_tokens
    ids, mask, (decoder,) = _generate([model], steps, prompts, sampling, stop_ids, uniforms, on_step)
    return Responses(ids, mask, decoder.logprobs[:, : ids.shape[1]] * mask)


def generate_mixed(
    student: DecodableModel,
    teacher: DecodableModel,
    use_teacher: Sequence[bool],
    prompts: Prompts,
    sampling: SamplingParams,
    stop_ids: Sequence[int],
    uniforms: Tensor,
    on_step: ProgressHook | None = None,
    *,
    entropies: bool = True,
) -> Responses:
    """Teacher-mixed responses, with the log-probabilities of both models recorded while decoding.

    Args:
        student: the model with distribution q.
        teacher: the model with distribution p.
        use_teacher: ``[max_new_tokens]`` whether the teacher samples the token at each step.
        prompts: ``[B, P]``, padded on the left.
        sampling: one temperature for both models.
        stop_ids: the tokens that end a response.
        uniforms: ``[B, max_new_tokens]`` from `row_uniforms`.
        on_step: called before every step, for progress bars.
        entropies: also record the entropy of both distributions at each token; costs a pass over the vocabulary per model.
    """
    model_indices = [int(teacher_samples) for teacher_samples in use_teacher]
    models = [student, teacher]
    ids, mask, (first, second) = _generate(
        models, model_indices, prompts, sampling, stop_ids, uniforms, on_step, entropies=entropies
    )
    length = ids.shape[1]
    return Responses(
        ids,
        mask,
        first.logprobs[:, :length] * mask,
        second.logprobs[:, :length] * mask,
        None if second.hidden is None else second.hidden[:, :length],
        torch.tensor(model_indices[:length], dtype=torch.bool, device=ids.device) & mask,
        None if first.entropies is None else first.entropies[:, :length] * mask,
        None if second.entropies is None else second.entropies[:, :length] * mask,
    )


@torch.no_grad()
def _generate(
    models: Sequence[DecodableModel],
    model_indices: Sequence[int],
    prompts: Prompts,
    sampling: SamplingParams,
    stop_ids: Sequence[int],
    uniforms: Tensor | None,
    on_step: ProgressHook | None,
    *,
    entropies: bool = False,
) -> tuple[Tensor, Tensor, list[CachedDecoder]]:
    """Generate with ``models[model_indices[t]]`` at step t.

    Returns:
        Ids and mask ``[B, T]``, and the `CachedDecoder` of each model.
    """
    groups = [model.tensor_parallel_group for model in models if model.tensor_parallel_group is not None]
    batch = DecodingBatch(prompts, sampling, stop_ids, uniforms, groups[0] if groups else None)
    device, steps = batch.ids.device, sampling.max_new_tokens
    look_every = LOOK_EVERY.get(device.type, 16)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model.generation_mode())
        collective = any(model.forward_is_collective for model in models)
        mixed = len(models) > 1
        capture = CudaCapture(device) if any(model.cuda_graphs for model in models) else None
        decoders = [
            CachedDecoder(model, batch, entropies, mixed and index > 0, capture if model.cuda_graphs else None)
            for index, model in enumerate(models)
        ]
        for step in range(steps):
            decoder = decoders[model_indices[step]]
            if on_step is not None:
                on_step(step, steps, len(decoder.rows))
            decoder.advance(step)
            if (step + 1) % look_every == 0:
                batch.look()
                if _max_over_ranks(len(batch.remaining), device, collective) == 0:
                    break
            decoder.drop_finished(at_least_one=collective)
        length = int(batch.mask.sum(dim=-1).max()) if len(prompts) else 0
        longest = _max_over_ranks(length, device, collective)
        for decoder in decoders:
            decoder.finish(longest)
    if on_step is not None:
        on_step(steps, steps, 0)
    return batch.ids[:, :length], batch.mask[:, :length], decoders


def _max_over_ranks(count: int, device: torch.device, collective: bool) -> int:
    """The largest ``count`` of all ranks if every forward pass needs all ranks, else the count of this rank."""
    if not collective:
        return count
    largest = torch.tensor(count, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)
