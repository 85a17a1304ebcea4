"""Errors along written texts equal slow loops over transformers' own logits, and their sums what enumeration says."""

from __future__ import annotations

import itertools

import pytest
import torch
from ranks import join_ranks
from tiny import tiny_llama

from lit_distill.evaluation.exposure_bias import STEP, StepKLMetric, step_errors, written_text
from lit_distill.generation import SamplingParams, generate, row_uniforms
from lit_distill.models import CausalLM
from lit_distill.teachers import FrozenTeacher
from lit_distill.types import Prompts

STOP = 2


def kl(log_p, log_q) -> float:
    return float((log_p.exp() * (log_p - log_q)).sum())


def next_logprobs(model, ids: list[int]):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def left_padded(rows: list[list[int]]) -> Prompts:
    width = max(map(len, rows))
    pad = [width - len(row) for row in rows]
    ids = torch.tensor([[0] * p + row for p, row in zip(pad, rows, strict=True)])
    return Prompts(ids, torch.tensor([[0] * p + [1] * len(row) for p, row in zip(pad, rows, strict=True)]))


def write(speaker, prompts: Prompts, length: int, seed: int = 0):
    uniforms = row_uniforms(seed, [str(i) for i in range(len(prompts))], length)
    return generate(speaker, prompts, SamplingParams(length), [STOP], uniforms)


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_errors_are_those_of_transformers_logits_token_by_token(student, teacher, chunk_rows) -> None:
    rows = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    prompts = left_padded(rows)
    responses = write(student, prompts, 20)
    text = written_text(prompts, responses)
    errors = step_errors(student, teacher, text, chunk_rows)
    expected, steps = [], []
    for row, ids, mask in zip(rows, responses.ids, responses.mask, strict=True):
        said = ids[mask].tolist()
        for t in range(len(said)):
            prefix = row + said[:t]
            expected.append(kl(next_logprobs(teacher.lm.model, prefix), next_logprobs(student.model, prefix)))
            steps.append(t)
    torch.testing.assert_close(errors, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert text.signals[STEP][text.target_mask].tolist() == steps


def test_a_text_that_has_ended_counts_as_free_of_error() -> None:
    metric = StepKLMetric(4)
    metric.update("student", torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]), num_texts=2)  # 1 | 2 3
    metric.update("teacher", torch.tensor([1.0, 1.0, 4.0]), torch.tensor([0, 1, 2]), num_texts=1)
    metric.update("teacher", torch.tensor([1.0]), torch.tensor([0]), num_texts=1)
    found = metric.compute()
    assert found.curves.regret.tolist() == [1.5, 3.0, 3.0, 3.0]
    assert found.curves.baseline.tolist() == [1.0, 1.5, 3.5, 3.5]
    assert found.curves.excess.tolist() == pytest.approx([50.0, 100.0, -100 / 7, -100 / 7])
    assert (found.longest, found.num_texts) == (3, 2)


def test_without_texts_of_both_there_are_no_curves() -> None:
    metric = StepKLMetric(4)
    metric.update("student", torch.tensor([1.0]), torch.tensor([0]), num_texts=1)
    assert metric.compute() is None


def test_a_teacher_that_is_its_own_student_has_no_excess(teacher) -> None:
    student, metric = teacher.lm, StepKLMetric(12)
    prompts = left_padded([[3, 4], [5]])
    for writer, speaker in (("student", student), ("teacher", teacher)):
        text = written_text(prompts, write(speaker, prompts, 12))
        metric.update(writer, step_errors(student, teacher, text), text.signals[STEP][text.target_mask], 2)
    curves = metric.compute().curves
    assert curves.excess.tolist() == [0.0] * 12
    assert curves.regret.tolist() == [0.0] * 12


def test_two_ranks_equal_one_on_an_odd_number_of_texts() -> None:
    texts = [(torch.rand(n), torch.arange(n)) for n in (3, 1, 6, 2, 5)]
    one, *two = (StepKLMetric(6) for _ in range(3))
    for index, (errors, steps) in enumerate(texts):
        for writer, scale in (("student", 2.0), ("teacher", 1.0 + index)):
            one.update(writer, errors * scale, steps, num_texts=1)
            two[index % 2].update(writer, errors * scale, steps, num_texts=1)
    alone, together = one.compute(), join_ranks(two).compute()
    assert (together.longest, together.num_texts) == (alone.longest, alone.num_texts) == (6, 5)
    for curve, expected in zip(together.curves, alone.curves, strict=True):
        torch.testing.assert_close(curve, expected, rtol=1e-12, atol=0)


@pytest.fixture(scope="module")
def small():
    """Two models of four tokens, one of which ends a text, and rather different."""
    torch.manual_seed(3)
    models = [tiny_llama(8, 4), tiny_llama(8, 4)]
    for model in models:
        model.lm_head.weight.data.mul_(25)
    return CausalLM(models[0]), FrozenTeacher(CausalLM(models[1]))


def laws(model, prompt: list[int], length: int) -> dict[tuple[int, ...], float]:
    """Log-probability of every text of ``length`` tokens, or fewer if it ends before."""
    found = {}
    for said in itertools.product(range(4), repeat=length):
        text = said[: said.index(STOP) + 1] if STOP in said else said
        if text not in found:
            parts = (next_logprobs(model, [*prompt, *text[:t]])[text[t]] for t in range(len(text)))
            found[text] = float(sum(parts))
    return found


def test_sums_along_sampled_texts_are_unbiased_against_enumeration_and_the_chain_rule(small) -> None:
    student, teacher = small
    prompt, length, samples = [1, 3], 3, 6000
    metric = StepKLMetric(length)
    prompts = left_padded([prompt] * samples)
    spread = {}
    for writer, speaker in (("student", student), ("teacher", teacher)):
        text = written_text(prompts, write(speaker, prompts, length, seed=7))
        errors, steps = step_errors(student, teacher, text), text.signals[STEP][text.target_mask]
        metric.update(writer, errors, steps, samples)
        per_text = torch.zeros(text.target_mask.shape)
        per_text[text.target_mask] = errors
        spread[writer] = float(per_text.sum(-1).std()) / samples**0.5
    curves = metric.compute().curves
    q, p = (laws(model, prompt, length) for model in (student.model, teacher.lm.model))
    divergence = sum(torch.tensor(p[text]).exp().item() * (p[text] - q[text]) for text in p)
    assert curves.baseline[-1].item() == pytest.approx(divergence, abs=4 * spread["teacher"])
    regret = 0.0
    for text, log_q in q.items():
        prefixes = [[*prompt, *text[:t]] for t in range(len(text))]
        errors = sum(kl(next_logprobs(teacher.lm.model, x), next_logprobs(student.model, x)) for x in prefixes)
        regret += torch.tensor(log_q).exp().item() * errors
    assert curves.regret[-1].item() == pytest.approx(regret, abs=4 * spread["student"])
    assert spread["student"] < 0.05 * regret
    assert abs(regret - divergence) > 8 * (spread["student"] + spread["teacher"])  # the two can be told apart
