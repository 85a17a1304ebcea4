"""Scores of responses equal slow computations of their own, add up over buckets, and do not depend on the ranks."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from nltk.stem.porter import PorterStemmer
from ranks import join_ranks

from lit_distill.evaluation.text_metrics import GenerationMetrics

WORDS = ["running", "runs", "ran", "cats", "cat", "a", "the", "easily", "Jumps,", "jumping"]


def random_items(seed: int, count: int = 9):
    draw = random.Random(seed)

    def sentence(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(0, most)))

    return [
        (sentence(9), [sentence(8) + " a" for _ in range(draw.randint(1, 3))], draw.randint(1, 20), draw.random() < 0.5)
        for _ in range(count)
    ]


def scored(metric: GenerationMetrics, items) -> GenerationMetrics:
    metric.update(*([list(column) for column in zip(*items, strict=True)] or [[], [], [], []]))
    return metric


def slow_rouge_l(said: str, wanted: str) -> float:
    def stems(text: str) -> list[str]:
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        return [PorterStemmer().stem(word) if len(word) > 3 else word for word in words]

    a, b = stems(said), stems(wanted)
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 200.0 * common / (len(a) + len(b)) if common else 0.0


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_slow_computations(seed: int) -> None:
    items = random_items(seed)
    scores = scored(GenerationMetrics(), items).compute()
    rouge = [max(slow_rouge_l(text, wanted) for wanted in accepted) for text, accepted, *_ in items]
    assert scores["rouge_l"].item() == pytest.approx(sum(rouge) / len(items), rel=1e-5)
    plain = [[t.lower().replace(",", "").split() for t in (text, *accepted)] for text, accepted, *_ in items]
    exact = [first in others for first, *others in plain]
    assert scores["exact_match"].item() == pytest.approx(100 * sum(exact) / len(items))
    assert scores["response_length"].item() == pytest.approx(sum(item[2] for item in items) / len(items))
    assert scores["unfinished"].item() == pytest.approx(sum(not item[3] for item in items) / len(items))
    for n in (1, 2, 3, 4):
        runs = [[tuple(w[i : i + n]) for i in range(len(w) - n + 1)] for w in (item[0].split() for item in items)]
        everything = Counter(run for row in runs for run in row)
        assert scores[f"distinct_{n}"].item() == pytest.approx(len(everything) / everything.total())
        again = sum(run in row[:i] for row in runs for i, run in enumerate(row))
    assert scores["repetition_4"].item() == pytest.approx(again / everything.total())


def test_a_hand_computed_case() -> None:
    items = [("a b a b a b", [["x", "a b"]][0], 7, False), ("a b", ["c"], 3, True)]
    scores = {name: value.item() for name, value in scored(GenerationMetrics(), items).compute().items()}
    assert scores == pytest.approx(
        {
            "rouge_l": 25.0,  # precision 2/6 and recall 1 make 50, and 0
            "exact_match": 0.0,
            "response_length": 5.0,
            "unfinished": 0.5,
            "distinct_1": 2 / 8,
            "distinct_2": 2 / 6,  # ab ba ab ba ab | ab
            "distinct_3": 2 / 4,
            "distinct_4": 2 / 3,  # abab baba abab
            "repetition_4": 1 / 3,
        }
    )


def test_the_same_words_in_runs_of_another_length_are_different_runs() -> None:
    scores = scored(GenerationMetrics(), [("a", ["a"], 1, True), ("a a", ["a"], 1, True)]).compute()
    assert scores["distinct_1"].item() == pytest.approx(1 / 3)
    assert scores["distinct_2"].item() == 1.0
    assert "distinct_3" not in scores


@pytest.mark.parametrize(("share", "others"), [((0, 2, 4, 6, 8), (1, 3, 5, 7)), (range(9), ())])
def test_two_ranks_equal_one_on_an_odd_number_of_items(share, others) -> None:
    items = random_items(3)
    alone = scored(GenerationMetrics([4]), items).compute()
    ranks = [scored(GenerationMetrics([4]), [items[i] for i in rows]) for rows in (share, others)]
    together = join_ranks(ranks).compute()
    assert set(together) == set(alone)
    for name, value in alone.items():
        assert together[name].item() == value.item(), name


def test_buckets_are_told_by_the_words_of_the_first_reference_and_add_up_to_the_whole() -> None:
    items = [("a b", ["a " * n, "a b"], n, True) for n in (1, 29, 30, 70, 71, 200, 2)]
    scores = scored(GenerationMetrics([30, 71]), items).compute()
    tags = ["under_30_words", "30-70_words", "over_70_words"]
    assert [scores[f"count/{tag}"].item() for tag in tags] == [3, 2, 2]
    for name in ("rouge_l", "exact_match", "response_length", "unfinished"):
        parts = sum(scores[f"{name}/{tag}"] * scores[f"count/{tag}"] for tag in tags)
        torch.testing.assert_close(parts / 7, scores[name])


def test_an_empty_bucket_has_no_score_and_nothing_at_all_has_none() -> None:
    scores = scored(GenerationMetrics([2, 5]), [("a", ["a b c"], 1, True)]).compute()
    assert {name.split("/")[1] for name in scores if "/" in name} == {"2-4_words"}
    assert scored(GenerationMetrics(), []).compute() == {}


def test_a_response_without_references_does_not_count() -> None:
    items = random_items(3)
    mixed = [*items[:4], ("the cats ran", [], 50, False), *items[4:]]
    expected, found = (scored(GenerationMetrics(), each).compute() for each in (items, mixed))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
