"""Text that is written under autocast without its cache, as Lightning's bf16-mixed has it."""

from __future__ import annotations

import torch
from tiny import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from lit_distill.generation import SamplingParams, generate, row_uniforms
from lit_distill.models import CausalLM
from lit_distill.types import Prompts


class Casts(TorchDispatchMode):
    """Counts how often a tensor of a shape is copied to bfloat16."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        wanted = (kwargs or {}).get("dtype") == torch.bfloat16
        self.count += wanted and func is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


def bf16_mixed() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def written(student: CausalLM, tokens: int):
    prompts = Prompts(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64))
    return generate(student, prompts, SamplingParams(tokens), (), row_uniforms(0, ["a", "b"], tokens))


def test_each_weight_is_cast_once_however_many_tokens_are_written() -> None:
    student = CausalLM(tiny_llama(intermediate_size=37))
    with bf16_mixed(), Casts(torch.Size([16, 37])) as casts:
        written(student, 9)
    assert casts.count == 2  # the down projections of two layers


def test_what_is_written_next_is_of_the_weights_of_then() -> None:
    """Also within the same autocast, as all steps of a phase are."""
    student = CausalLM(tiny_llama())
    with bf16_mixed():
        written(student, 5)
        with torch.no_grad():
            student.model.model.layers[0].mlp.down_proj.weight.mul_(-30)
        ids = torch.arange(12).view(2, 6)
        hidden = student(ids, torch.ones_like(ids))
        again = written(student, 5)
    assert hidden.requires_grad
    with bf16_mixed():
        assert torch.equal(student(ids, torch.ones_like(ids)), hidden)
        assert torch.equal(written(student, 5).logprobs, again.logprobs)
    assert not torch.equal(written(CausalLM(tiny_llama()), 5).logprobs, again.logprobs)
