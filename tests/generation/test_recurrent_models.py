"""Models that keep a state write what plain forwards over the whole text say, whatever their cache is good for."""

from __future__ import annotations

import pytest
import torch
from architectures import RECURRENT, VOCABULARY, tiny
from torch import Tensor

from lit_distill.generation import SamplingParams, generate, generate_mixed, row_uniforms
from lit_distill.generation import decoder as loop
from lit_distill.generation.sampling import sample_tokens
from lit_distill.models import CausalLM, check_head
from lit_distill.teachers import FrozenTeacher
from lit_distill.types import Prompts, Sequences

STEPS = 12
LENGTHS = (6, 2, 4, 5)
STOPS = (7, 11, 13, 17, 20, 29, 31, 37, 41, 45)
PROMPTS = [
    torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS
]
KINDS = {
    **RECURRENT,
    "llama": {},
    "gemma2": {"sliding_window": 4},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}
WITHOUT_A_CACHE = {"xlstm", "rwkv", "recurrent_gemma", "minimax", "openai-gpt"}  # of transformers 5.24


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def models(kind, monkeypatch) -> tuple[CausalLM, FrozenTeacher]:
    """A student, and a teacher that is another one; finished rows leave them soon."""
    monkeypatch.setattr(loop, "LOOK_EVERY", {"cpu": 2})
    student, teacher = (CausalLM(tiny(kind, **KINDS[kind])) for _ in range(2))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    return student, FrozenTeacher(teacher)


def prompts() -> Prompts:
    width = max(LENGTHS)
    ids, mask = torch.full((len(LENGTHS), width), 9), torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    return Prompts(ids, mask)


@torch.no_grad()
def next_logits(lm: CausalLM, row: int, written: Tensor) -> Tensor:
    """``[t + 1, V]``: what a plain forward over prompt and text says of each token of the text, and of the next."""
    text = torch.cat([PROMPTS[row], written])[None]
    return lm.model(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False).logits[0, LENGTHS[row] - 1 :]


def check_logprobs(lm: CausalLM, row: int, text: Tensor, logprobs: Tensor) -> None:
    expected = next_logits(lm, row, text)[:-1].log_softmax(-1).gather(-1, text[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)


def test_greedy_text_is_that_of_plain_forwards(models) -> None:
    student, _ = models
    greedy = SamplingParams(STEPS, temperature=0.0)
    stops = generate(student, prompts(), greedy, ()).ids[0, 3:4].tolist()  # so that at least one ends soon
    said = generate(student, prompts(), greedy, stops)
    for row, length in enumerate(said.mask.sum(dim=-1).tolist()):
        text = said.ids[row, :length]
        assert torch.equal(text, next_logits(student, row, text)[:-1].argmax(-1))
        assert length == STEPS or int(text[-1]) in stops
        check_logprobs(student, row, text, said.logprobs[row, :length])


@pytest.mark.slow
def test_mixed_text_is_drawn_from_and_scored_by_plain_forwards_of_both(models) -> None:
    student, teacher = models
    coins = [step in (3, 4, 9) for step in range(STEPS)]  # the teacher has something to catch up with
    uniforms = row_uniforms(1, list("abcd"), STEPS)
    said = generate_mixed(student, teacher, coins, prompts(), SamplingParams(STEPS), STOPS, uniforms)
    lengths = said.mask.sum(dim=-1).tolist()
    assert min(lengths) < max(lengths)
    for row, length in enumerate(lengths):
        text = said.ids[row, :length]
        by = [next_logits(lm, row, text) for lm in (student, teacher.lm)]
        drawn = [
            sample_tokens(by[coins[t]][t][None], uniforms[row, t : t + 1], SamplingParams(STEPS)) for t in range(length)
        ]
        assert torch.equal(text, torch.cat(drawn))
        check_logprobs(student, row, text, said.logprobs[row, :length])
        check_logprobs(teacher.lm, row, text, said.teacher_logprobs[row, :length])


@torch.no_grad()
def test_padding_after_a_text_changes_nothing_of_it(models) -> None:
    student, _ = models
    check_head(student, "model.student")
    width = max(LENGTHS) + 3
    ids, mask = torch.zeros(len(LENGTHS), width, dtype=torch.int64), torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    rows = student.target_rows(Sequences(ids, mask, mask.bool() & (torch.arange(width) >= 1)))
    plain = [student(prompt[None], torch.ones_like(prompt)[None])[0, :-1] for prompt in PROMPTS]
    torch.testing.assert_close(rows, torch.cat(plain), rtol=1e-4, atol=1e-4)


def test_who_has_no_cache_that_works_says_so_once(models, kind, caplog) -> None:
    student, _ = models
    for _ in range(2):
        generate(student, prompts(), SamplingParams(2, temperature=0.0), ())
    warned = [record for record in caplog.records if "without a key-value cache" in record.message]
    assert len(warned) == (not student.caching.works)
    assert student.caching.works or kind in WITHOUT_A_CACHE
