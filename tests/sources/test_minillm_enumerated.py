"""The mean gradient of the whole pipeline, over every sequence there is, against autograd of the exact KL(q‖p).

A vocabulary of three, one of which ends the text, and at most three tokens: everything the sampler may say is enumerated with its
probability, scored by `AdvantageConfig`, and learnt from by `PolicyGradient` (Long) and `ReverseKL` (Single) through the chunked
head.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_distill.losses import ObjectiveEvaluator
from lit_distill.models import CausalLM
from lit_distill.objectives import ExtrapolatedReverseKL, PolicyGradient, ReverseKL
from lit_distill.sources import AdvantageConfig
from lit_distill.teachers import FrozenTeacher
from lit_distill.types import Prompts, Responses, Trajectories

STOP, STEPS, PROMPT = 0, 3, 1


def sequences() -> list[list[int]]:
    whole = itertools.product(range(3), repeat=STEPS)
    cut = {s[: s.index(STOP) + 1] if STOP in s else s for s in whole}
    return [list(s) for s in sorted(cut)]


@pytest.fixture
def models(make_model) -> tuple[CausalLM, FrozenTeacher]:
    student, teacher = (make_model("llama", 1, seed=s, vocab_size=3) for s in (0, 4))
    for model in (student, teacher):
        model.get_output_embeddings().weight.data *= 0.7
    return CausalLM(student), FrozenTeacher(CausalLM(teacher))


def logprobs(lm: CausalLM, sequence: list[int]) -> Tensor:
    """[T] of each token given what stands before it, with its graph."""
    whole = torch.tensor([[PROMPT, *sequence]])
    return lm.model(input_ids=whole).logits[0, :-1].log_softmax(-1).gather(-1, whole[0, 1:, None])[:, 0]


def exact_gradient(
    student: CausalLM,
    teacher: FrozenTeacher,
    score: Callable[[list[int]], float] = lambda _: 0.0,
    reference: FrozenTeacher | None = None,
    extrapolation: float = 1.0,
) -> Tensor:
    """Of the mean of log q − λ log p + (λ − 1) log r − score, in float64, so that only the pipeline rounds."""
    student, frozen = copy.deepcopy(student).double(), copy.deepcopy(teacher.lm).double()
    third = copy.deepcopy((reference or teacher).lm).double()
    kl = 0
    for sequence in sequences():
        log_q, log_p, log_r = (logprobs(lm, sequence).sum() for lm in (student, frozen, third))
        target = extrapolation * log_p - (extrapolation - 1) * log_r + score(sequence)
        kl = kl + log_q.exp() * (log_q - target)
    return flat(torch.autograd.grad(kl, list(student.parameters()))).float()


def flat(gradients) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def mean_gradient(
    models,
    objectives,
    alpha: float,
    scoring: AdvantageConfig,
    score: Callable[[list[int]], float] | None = None,
    reference: FrozenTeacher | None = None,
) -> Tensor:
    """The objectives' gradient summed over a sequence's tokens, in the mean over sequences drawn from the mixture."""
    student, teacher = models
    measure = ObjectiveEvaluator(objectives, student, teacher, "model.objectives", chunk_rows=2, reference=reference)
    prompts = Prompts(torch.tensor([[PROMPT]]), torch.ones(1, 1, dtype=torch.int64))
    student.zero_grad()
    total = 0.0
    for sequence in sequences():
        with torch.no_grad():
            log_q, log_p = logprobs(student, sequence), logprobs(teacher.lm, sequence)
        probability = float((alpha * log_p.exp() + (1 - alpha) * log_q.exp()).prod())
        total += probability
        ids = torch.tensor([sequence])
        responses = Responses(ids, torch.ones_like(ids, dtype=torch.bool), log_q[None], log_p[None])
        scores = None if score is None else torch.tensor([score(sequence)])
        log_r = None if reference is None else logprobs(reference.lm, sequence).detach()[None]
        signals = scoring.signals(responses, alpha, None, log_r, scores)
        text = Trajectories(("0",), ("",), prompts, responses, signals, alpha, 0.0).sequences()
        measure(text, dict.fromkeys(objectives, probability))[0].backward()
    assert total == pytest.approx(1.0, abs=1e-6)
    return flat([p.grad for p in student.parameters()])


def minillm(models, alpha: float, clip_range: float | None = None, **scoring) -> Tensor:
    """Long and Single with the paper's choices, but for length normalisation."""
    objectives = {"long": PolicyGradient(clip_range=clip_range), "single": ReverseKL(importance_weighted=True)}
    return mean_gradient(models, objectives, alpha, AdvantageConfig(**{"length_normalize": False, **scoring}))


def single(models, alpha: float, kind: str = "token") -> Tensor:
    objectives = {"single": ReverseKL(importance_weighted=True)}
    return mean_gradient(models, objectives, alpha, AdvantageConfig(importance_weight=kind))


def error(ours: Tensor, exact: Tensor) -> float:
    """Length of the difference, relative to that of the exact gradient."""
    return float(torch.linalg.vector_norm(ours - exact) / torch.linalg.vector_norm(exact))


def test_on_policy_the_papers_long_and_single_terms_are_the_gradient_of_reverse_kl(models) -> None:
    assert error(minillm(models, 0.0, clip_range=0.2), exact_gradient(*models)) < 1e-6


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_with_exact_weights_they_are_so_for_any_share_of_the_teacher(models, alpha: float) -> None:
    assert error(minillm(models, alpha, importance_weight="exact"), exact_gradient(*models)) < 1e-6


@pytest.mark.parametrize("kind", ["token", "prefix"])
def test_the_published_weights_are_biased(models, kind: str) -> None:
    assert 0.01 < error(minillm(models, 0.2, importance_weight=kind), exact_gradient(*models)) < 0.6


def test_prefix_and_exact_weights_make_the_single_term_exact_and_token_weights_do_not(models) -> None:
    on_policy = single(models, 0.0)
    assert error(single(models, 0.2, "prefix"), on_policy) < 1e-6
    assert error(single(models, 0.2, "exact"), on_policy) < 1e-6
    assert error(single(models, 0.2, "token"), on_policy) > 0.005


def test_the_reference_codes_return_adds_the_single_term_once_more(models) -> None:
    """PAPERS: un-normalised with γ = 1 and α = 0 its mean is ∇L + Single."""
    added = minillm(models, 0.0, include_current=True) - minillm(models, 0.0)
    assert error(added, single(models, 0.0)) < 1e-5  # a difference of two sums


def test_where_student_and_teacher_agree_there_is_no_gradient(make_model) -> None:
    model = make_model("llama", 1, vocab_size=3)
    pair = CausalLM(model), FrozenTeacher(CausalLM(make_model("llama", 1, vocab_size=3)))
    assert minillm(pair, 0.2, length_normalize=True).abs().max() < 1e-6


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_a_score_of_the_response_is_a_reward_of_the_whole_response(models, alpha: float) -> None:
    """Its last token counts too: the Single term, which covers a token's own reward, knows the teacher's alone."""

    def score(sequence: list[int]) -> float:
        return 0.7 * sequence.count(2) - 0.3 * (sequence[-1] == STOP)

    objectives = {"long": PolicyGradient(clip_range=None), "single": ReverseKL(importance_weighted=True)}
    scoring = AdvantageConfig(length_normalize=False, importance_weight="exact")
    ours, exact = mean_gradient(models, objectives, alpha, scoring, score), exact_gradient(*models, score)
    assert error(ours, exact) < 1e-6
    assert error(exact_gradient(*models), exact) > 0.1


@pytest.mark.parametrize(("extrapolation", "alpha"), [(0.5, 0.0), (1.25, 0.0), (2.0, 0.0), (0.5, 0.4), (1.25, 0.4)])
def test_the_extrapolated_reward_has_the_gradient_of_its_exact_objective(
    models, make_model, extrapolation: float, alpha: float
) -> None:
    reference = FrozenTeacher(CausalLM(make_model("llama", 1, seed=9, vocab_size=3)))
    single = ExtrapolatedReverseKL(scale=extrapolation, importance_weighted=alpha > 0)
    objectives = {"long": PolicyGradient(clip_range=None), "single": single}
    scoring = AdvantageConfig(length_normalize=False, extrapolation=extrapolation, importance_weight="exact")
    ours = mean_gradient(models, objectives, alpha, scoring, reference=reference)
    exact = exact_gradient(*models, reference=reference, extrapolation=extrapolation)
    assert error(ours, exact) < 2e-6
    assert error(exact_gradient(*models), exact) > 0.05
