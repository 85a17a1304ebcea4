"""Teacher-mixed rollouts follow the mixture's law, and everything they record equals a full re-score, for every model family."""

from __future__ import annotations

import itertools
from collections import Counter
from math import prod

import pytest
import torch
from torch import Tensor

from lit_distill.generation import SamplingParams, generate, generate_mixed, row_uniforms
from lit_distill.models import CausalLM
from lit_distill.models.caching import Caching
from lit_distill.teachers import FrozenTeacher
from lit_distill.types import Prompts, Responses

STEPS, STOPS = 24, (5, 6, 7)
LENGTHS = (6, 1, 4, 9, 2)


@pytest.fixture
def models(family: str, make_model) -> tuple[CausalLM, FrozenTeacher]:
    return CausalLM(make_model(family, num_layers=2)), FrozenTeacher(CausalLM(make_model(family, num_layers=3, seed=1)))


def require_prompts(lengths=LENGTHS, extra: int = 0) -> Prompts:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(8, 64, (n,), generator=generator).tolist() for n in lengths]
    width = max(lengths) + extra
    ids = [[2] * (width - len(row)) + row for row in rows]
    return Prompts(torch.tensor(ids), torch.tensor([[0] * (width - n) + [1] * n for n in lengths]))


def coins_of(alpha: float, steps: int = STEPS) -> list[bool]:
    return (torch.rand(steps, generator=torch.Generator().manual_seed(7)) < alpha).tolist()


def rollout(models, alpha: float, temperature: float = 1.0, extra: int = 0) -> Responses:
    uniforms = row_uniforms(0, [str(i) for i in range(len(LENGTHS))], STEPS)
    return generate_mixed(
        *models, coins_of(alpha), require_prompts(extra=extra), SamplingParams(STEPS, temperature), STOPS, uniforms
    )


@torch.no_grad()
def rescored(
    lm: CausalLM, prompts: Prompts, responses: Responses, row: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and hidden rows of one response from one forward over the whole text, without cache or padding."""
    prompt = prompts.input_ids[row][prompts.attention_mask[row].bool()]
    response = responses.ids[row][responses.mask[row]]
    whole = torch.cat([prompt, response])[None]
    logits = lm.model(input_ids=whole).logits[0, len(prompt) - 1 : -1].float() / temperature
    hidden = lm.model.base_model(input_ids=whole).last_hidden_state[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, response[:, None])[:, 0], hidden


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_what_is_recorded_equals_a_full_rescore_with_ragged_prompts_and_early_stops(models, alpha: float) -> None:
    student, teacher = models
    responses, prompts = rollout(models, alpha, temperature=1.2), require_prompts()
    lengths = responses.mask.sum(-1)
    assert lengths.min() < lengths.max()
    for row in range(len(LENGTHS)):
        by_student, _ = rescored(student, prompts, responses, row, 1.2)
        by_teacher, hidden = rescored(teacher.lm, prompts, responses, row, 1.2)
        kept = responses.mask[row]
        torch.testing.assert_close(responses.logprobs[row][kept], by_student, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(responses.teacher_logprobs[row][kept], by_teacher, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(responses.teacher_hidden[row][kept], hidden, rtol=1e-4, atol=1e-4)


def test_padding_changes_no_token(models) -> None:
    plain, padded = rollout(models, 0.3), rollout(models, 0.3, extra=4)
    assert torch.equal(plain.ids, padded.ids)
    assert torch.equal(plain.mask, padded.mask)
    torch.testing.assert_close(plain.teacher_logprobs, padded.teacher_logprobs)


def test_with_no_heads_it_is_the_students_sampler_and_with_no_tails_the_teachers(models) -> None:
    uniforms = row_uniforms(0, [str(i) for i in range(len(LENGTHS))], STEPS)
    for alpha, speaker in ((0.0, models[0]), (1.0, models[1])):
        alone = generate(speaker, require_prompts(), SamplingParams(STEPS), STOPS, uniforms)
        mixed = rollout(models, alpha)
        assert torch.equal(alone.ids, mixed.ids)
        recorded = mixed.logprobs if alpha == 0 else mixed.teacher_logprobs
        torch.testing.assert_close(alone.logprobs, recorded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_each_body_passes_once_over_each_token_and_the_teacher_runs_at_heads_only(models, alpha: float) -> None:
    student, teacher = models
    seen = {"student": [], "teacher": []}
    for name, lm in (("student", student), ("teacher", teacher.lm)):
        lm.caching = Caching(works=True)  # found out before
        lm.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(tuple(args[0].shape)))
    uniforms = row_uniforms(0, [str(i) for i in range(len(LENGTHS))], STEPS)
    coins = coins_of(alpha)
    responses = generate_mixed(
        *models, coins, require_prompts(), SamplingParams(STEPS), (), uniforms
    )  # nothing stops: exact counts
    assert responses.mask.all()
    tokens = len(LENGTHS) * (max(LENGTHS) + STEPS - 1)  # the last token predicts nothing
    for shapes in seen.values():
        assert sum(rows * columns for rows, columns in shapes) == tokens
    assert len(seen["teacher"]) == sum(coins) + (not coins[-1])
    assert len(seen["student"]) == STEPS - sum(coins) + coins[-1]


def test_rows_that_have_finished_leave_both_models(make_model) -> None:
    models = CausalLM(make_model("llama", 2)), FrozenTeacher(CausalLM(make_model("llama", 2, seed=1)))
    seen = {"student": 0, "teacher": 0}
    for name, lm in (("student", models[0]), ("teacher", models[1].lm)):
        lm.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, seen[name] + args[0].numel()))
    batch, steps, stops = 64, 64, tuple(range(8, 14))
    prompts = Prompts(torch.full((batch, 1), 20), torch.ones(batch, 1, dtype=torch.int64))
    uniforms = row_uniforms(0, [str(i) for i in range(batch)], steps)
    responses = generate_mixed(*models, coins_of(0.2, steps), prompts, SamplingParams(steps), stops, uniforms)
    written = int(responses.mask.sum())
    assert written < 0.5 * responses.mask.numel()
    # A row goes on until the next look, which is at most eight tokens late, or the teacher's next turn after it.
    assert seen["student"] < written + 10 * batch
    assert seen["teacher"] < written + 20 * batch


def test_bf16_models_record_what_their_own_rescore_says(make_model) -> None:
    models = (
        CausalLM(make_model("llama", 2).bfloat16()),
        FrozenTeacher(CausalLM(make_model("llama", 2, seed=1).bfloat16())),
    )
    responses = rollout(models, 0.3)
    assert responses.logprobs.dtype == torch.float32
    for row in range(len(LENGTHS)):
        expected, _ = rescored(models[0], require_prompts(), responses, row, 1.0)
        torch.testing.assert_close(responses.logprobs[row][responses.mask[row]], expected, rtol=0.05, atol=0.15)


def test_every_sequence_has_the_probability_of_the_mixture(make_model) -> None:
    """χ² over all texts of three tokens at each throw of the coins; by their chances, the throws add up to the mixture."""
    student, teacher = make_model("llama", 1, vocab_size=3), make_model("llama", 1, seed=4, vocab_size=3)
    models = CausalLM(student), FrozenTeacher(CausalLM(teacher))
    for model in (student, teacher):
        model.get_output_embeddings().weight.data *= 0.5
    rows, steps, stop = 4000, 3, 0
    prompts = Prompts(torch.full((rows, 1), 1), torch.ones(rows, 1, dtype=torch.int64))
    whole = itertools.product(range(3), repeat=steps)
    texts = sorted({text[: text.index(stop) + 1] if stop in text else text for text in whole})
    by_student, by_teacher = ([token_probabilities(model, text) for text in texts] for model in (student, teacher))
    throws = list(itertools.product((False, True), repeat=steps))
    laws = torch.tensor([
        [prod(p if coin else q for coin, q, p in zip(coins, *speakers, strict=False))
         for speakers in zip(by_student, by_teacher, strict=True)]
        for coins in throws
    ])  # fmt: skip
    generator = torch.Generator().manual_seed(11)
    for coins, law in zip(throws, laws, strict=True):
        uniforms = torch.rand(rows, steps, generator=generator, dtype=torch.float64)
        responses = generate_mixed(*models, coins, prompts, SamplingParams(steps), (stop,), uniforms)
        lengths = responses.mask.sum(dim=-1).tolist()
        said = Counter(tuple(ids[:n]) for ids, n in zip(responses.ids.tolist(), lengths, strict=True))
        assert set(said) <= set(texts)
        chi_square = sum((said[text] - rows * p) ** 2 / (rows * p) for text, p in zip(texts, law.tolist(), strict=True))
        degrees = len(texts) - 1
        assert chi_square < degrees + 3 * (2 * degrees) ** 0.5, coins
    for alpha in (0.2, 0.7):
        chances = torch.tensor([prod(alpha if coin else 1 - alpha for coin in coins) for coins in throws])
        mixture = [
            prod(alpha * p + (1 - alpha) * q for q, p in zip(*speakers, strict=True))
            for speakers in zip(by_student, by_teacher, strict=True)
        ]
        torch.testing.assert_close(chances @ laws, torch.tensor(mixture), rtol=1e-5, atol=0)


@torch.no_grad()
def token_probabilities(model: torch.nn.Module, text: tuple[int, ...]) -> list[float]:
    """Of each token of a text after the prompt [1], by the model's own logits."""
    whole = torch.tensor([[1, *text]])
    return model(input_ids=whole).logits[0, :-1].softmax(-1).gather(-1, whole[0, 1:, None])[:, 0].tolist()
