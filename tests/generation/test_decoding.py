"""The decode loop says what a plain loop over the whole text would say, whatever is decoded beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_distill.generation import SamplingParams, generate, row_uniforms
from lit_distill.generation.sampling import sample, sample_tokens
from lit_distill.models import CausalLM
from lit_distill.models.caching import Caching
from lit_distill.types import Prompts, Responses

LENGTHS = (5, 2, 7, 1)
STOP = (3, 4)


def require_prompts(rows: list[list[int]], pad: int = 0, extra: int = 0) -> Prompts:
    width = max(map(len, rows)) + extra
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return Prompts(ids, mask)


@pytest.fixture
def rows() -> list[list[int]]:
    return [torch.randint(5, 41, (length,)).tolist() for length in LENGTHS]


@torch.no_grad()
def rescored(lm: CausalLM, row: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probability of each response token from one forward over the whole text, without cache or padding."""
    logits = lm.model(input_ids=torch.tensor([row + response])).logits[0, len(row) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def response(responses: Responses, row: int) -> list[int]:
    return responses.ids[row][responses.mask[row]].tolist()


def test_greedy_decoding_is_the_argmax_of_the_whole_text_at_every_step(student: CausalLM, rows) -> None:
    responses = generate(student, require_prompts(rows), SamplingParams(max_new_tokens=12, temperature=0.0), STOP)
    for i, row in enumerate(rows):
        text = list(row)
        for _ in range(12):
            with torch.no_grad():
                text.append(int(student.model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
            if text[-1] in STOP:
                break
        assert response(responses, i) == text[len(row) :]


def test_recorded_log_probabilities_equal_a_full_rescore_with_ragged_prompts_and_early_stops(student, rows) -> None:
    sampling = SamplingParams(max_new_tokens=30, temperature=1.3)
    responses = generate(student, require_prompts(rows), sampling, STOP, row_uniforms(0, "abcd", 30))
    lengths = responses.mask.sum(-1)
    assert lengths.min() < lengths.max()
    for i, row in enumerate(rows):
        expected = rescored(student, row, response(responses, i), 1.3)
        torch.testing.assert_close(responses.logprobs[i][responses.mask[i]], expected, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_generates_as_it_is_with_its_cache(student, rows) -> None:
    compiled = CausalLM(student.model, compile_body=True)
    given = require_prompts(rows), SamplingParams(max_new_tokens=9), STOP, row_uniforms(0, "abcd", 9)
    found = generate(compiled, *given)
    student.model.base_model._compiled_call_impl = None
    assert compiled.caching == Caching(True)
    assert torch.equal(found.logprobs, generate(student, *given).logprobs)


def test_padding_and_neighbours_change_no_response(student, rows) -> None:
    sampling = SamplingParams(max_new_tokens=20)
    together = generate(student, require_prompts(rows), sampling, STOP, row_uniforms(0, "abcd", 20))
    padded = generate(student, require_prompts(rows, pad=7, extra=3), sampling, STOP, row_uniforms(0, "abcd", 20))
    assert torch.equal(together.ids, padded.ids)
    for i, row in enumerate(rows):
        alone = generate(student, require_prompts([row]), sampling, STOP, row_uniforms(0, "abcd"[i], 20))
        assert response(alone, 0) == response(together, i)


def test_a_response_ends_with_its_first_stop_token_which_is_part_of_it(student, rows) -> None:
    responses = generate(
        student,
        require_prompts(rows * 8),
        SamplingParams(max_new_tokens=60),
        STOP,
        row_uniforms(1, [str(i) for i in range(32)], 60),
    )
    stopped = 0
    for i in range(32):
        tokens = response(responses, i)
        assert not set(tokens[:-1]) & set(STOP)
        stopped += tokens[-1] in STOP
        assert not responses.ids[i][~responses.mask[i]].any()
        assert tokens[-1] in STOP or len(tokens) == 60
    assert stopped > 16


def test_finished_rows_leave_the_batch(student, rows) -> None:
    sizes = []
    student.caching = Caching(works=True)  # found out before
    student.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    responses = generate(
        student,
        require_prompts(rows * 8),
        SamplingParams(max_new_tokens=60),
        STOP,
        row_uniforms(1, [str(i) for i in range(32)], 60),
    )
    assert sizes[0] == 32
    assert sizes[-1] < 8
    assert sum(sizes) < 0.8 * 32 * responses.ids.shape[1]


def test_a_response_is_fixed_by_seed_and_item() -> None:
    assert torch.equal(row_uniforms(3, ["a", "b"], 5)[1], row_uniforms(3, ["b"], 5)[0])
    assert not torch.equal(row_uniforms(3, ["b"], 5), row_uniforms(4, ["b"], 5))
    assert torch.equal(row_uniforms(3, ["b"], 9)[:, :5], row_uniforms(3, ["b"], 5))


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -1.0]])
    tokens = sample_tokens(logits.expand(100_000, -1), torch.rand(100_000, dtype=torch.float64), SamplingParams())
    observed, expected = torch.bincount(tokens, minlength=5), logits.softmax(-1)[0] * 100_000
    possible = expected > 0
    assert observed[~possible].sum() == 0
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("vocabulary", [3, 255, 256, 257, 1000])
def test_a_draw_is_where_the_cumulative_distribution_passes_the_number(vocabulary: int) -> None:
    numbers = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, vocabulary, generator=numbers)
    logits[:, ::2] = -torch.inf  # tokens 0, 2, ...: among them the first and, if V is odd, the last
    uniforms = torch.rand(500, generator=numbers, dtype=torch.float64)
    uniforms[0], uniforms[1] = 0, 1 - 2**-53
    drawn = sample(logits, uniforms, SamplingParams())
    cumulative = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    distance = (cumulative.gather(-1, expected[:, None])[:, 0] - uniforms).abs().minimum(uniforms)
    clear = (distance > 1e-6) | (torch.arange(500) < 2)
    assert clear.sum() > 400
    assert torch.equal(drawn.tokens[clear], expected[clear])
    assert (drawn.tokens % 2 == 1).all()
    scored = logits.double().log_softmax(-1).gather(-1, drawn.tokens[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs.double(), scored, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(top_k=2), SamplingParams(top_p=0.5), SamplingParams(temperature=0)]
)
def test_logprobs_of_truncated_and_greedy_draws_are_those_of_all_logits(sampling: SamplingParams) -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits, torch.rand(50), sampling)
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(-1).gather(-1, drawn.tokens[:, None])[:, 0])


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [(SamplingParams(top_k=2), {1, 3}), (SamplingParams(top_p=0.7), {1, 3}), (SamplingParams(top_p=0.1), {3})],
)
def test_truncation_leaves_the_most_probable_tokens(sampling: SamplingParams, allowed: set[int]) -> None:
    logits = torch.tensor([[0.0, 1.0, -3.0, 2.0, -1.0]])  # probabilities .09 .24 .00 .64 .03
    assert set(sample_tokens(logits.expand(2000, -1), torch.rand(2000), sampling).tolist()) == allowed


@pytest.mark.parametrize(
    "setting", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_settings_that_cannot_be_are_named(setting: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))}: expected"):
        SamplingParams(**setting)
