"""pass@k equals the enumeration of all subsets, and the terms on the student's texts equal a slow computation."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from lit_distill.evaluation.on_policy import OnPolicyTerms, pass_at_k
from lit_distill.losses import ObjectiveEvaluator
from lit_distill.objectives.base import probe


@pytest.mark.parametrize("num_responses", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response(num_responses: int) -> None:
    for k in range(1, num_responses + 1):
        expected = []
        for correct in range(num_responses + 1):
            subsets = list(combinations([True] * correct + [False] * (num_responses - correct), k))
            expected.append(sum(any(subset) for subset in subsets) / len(subsets))
        found = pass_at_k(num_responses, torch.arange(num_responses + 1), k)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_pass_at_k_is_unbiased_where_the_plug_in_estimate_is_not() -> None:
    n, k, chance = 6, 4, 0.3
    counts = torch.arange(n + 1)
    weights = torch.distributions.Binomial(n, torch.tensor(chance, dtype=torch.float64)).log_prob(counts.double()).exp()
    exact = 1 - (1 - chance) ** k
    assert float((weights * pass_at_k(n, counts, k)).sum()) == pytest.approx(exact, abs=1e-9)
    assert float((weights * (1 - (1 - counts / n) ** k)).sum()) != pytest.approx(exact, abs=1e-2)


def test_pass_at_k_has_any_shape_and_is_exact_for_many_responses() -> None:
    found = pass_at_k(2000, torch.tensor([[0, 1], [2000, 1000]]), 1000)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5], [1.0, 1.0]], dtype=torch.float64))
    assert pass_at_k(3, torch.zeros(0, dtype=torch.int64), 2).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, torch.tensor([1]), 5), r"^k: expected 1 to 4, the number of responses, got 5\.$"),
        ((4, torch.tensor([1]), 0), r"^k: .*got 0\.$"),
        ((4, torch.tensor([1, 5]), 2), r"^num_correct: expected 0 to 4, got \[1, 5\]\.$"),
        ((4, torch.tensor([-1]), 2), r"^num_correct: "),
    ],
)
def test_numbers_that_cannot_be_are_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(*arguments)


@pytest.mark.parametrize("top_k", [1, 3, 9, 40])
def test_the_terms_equal_a_slow_computation(top_k: int) -> None:
    student, teacher = torch.randn(6, 9), torch.randn(6, 9)
    term = OnPolicyTerms(top_k)(student, teacher)
    assert tuple(term.metrics) == OnPolicyTerms.metric_names
    assert term.count == 6
    overlap, entropies, divergence = 0.0, [0.0, 0.0], 0.0
    for q_row, p_row in zip(student.double(), teacher.double(), strict=True):
        best = [set(row.argsort(descending=True)[:top_k].tolist()) for row in (q_row, p_row)]
        overlap += len(best[0] & best[1]) / len(best[0])
        q, p = q_row.softmax(0), p_row.softmax(0)
        entropies = [e - float((r * r.log()).sum()) for e, r in zip(entropies, (q, p), strict=True)]
        divergence += float((q * (q / p).log()).sum())
    found = {name: value.item() for name, value in term.metrics.items()}
    expected = dict(zip(OnPolicyTerms.metric_names, (overlap, *entropies, divergence), strict=True))
    assert found == pytest.approx(expected, rel=1e-5)
    assert term.total.item() == pytest.approx(divergence, rel=1e-5)


def test_a_model_agrees_with_itself() -> None:
    logits = torch.randn(6, 50)
    metrics = OnPolicyTerms()(logits, logits.clone()).metrics
    assert metrics["top_k_overlap"].item() == 6
    assert metrics["on_policy_reverse_kl"].item() == pytest.approx(0, abs=1e-5)
    assert metrics["on_policy_student_entropy"].item() == metrics["on_policy_teacher_entropy"].item()


def test_chunks_of_logits_change_nothing(student, teacher, text) -> None:
    sums = []
    for chunk_rows in (None, 1, 7):
        evaluator = ObjectiveEvaluator({"it": OnPolicyTerms(3)}, student, teacher, "on_policy", chunk_rows)
        with torch.no_grad():
            sums.append(evaluator(text, {"it": 1.0})[1]["it"].metrics)
    for other in sums[1:]:
        torch.testing.assert_close(dict(other), dict(sums[0]))


def test_it_is_an_objective_that_counts_every_row() -> None:
    assert not probe(OnPolicyTerms(), 5, "on_policy")


def test_no_token_at_all_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"^top_k: expected at least 1, got 0"):
        OnPolicyTerms(0)
