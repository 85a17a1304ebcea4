"""Text measures against cases computed by hand and slow implementations of their own."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lit_distill.evaluation.ngrams import distinct_n, exact_match, repetition_rate, rouge_l


def longest_common_subsequence(a, b):
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common_subsequence(a[1:], b[1:])
    return max(longest_common_subsequence(a[1:], b), longest_common_subsequence(a, b[1:]))


def slow_rouge_l(prediction, references):
    """For words of at most 3 letters, which are never stemmed."""
    best = 0.0
    for reference in references:
        said, wanted = prediction.split(), reference.split()
        common = longest_common_subsequence(said, wanted)
        if common:
            precision, recall = common / len(said), common / len(wanted)
            best = max(best, 2 * precision * recall / (precision + recall))
    return 100 * best


@pytest.mark.parametrize("seed", range(20))
def test_rouge_l_is_the_best_f1_of_the_longest_common_subsequence(seed):
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(["a", "b", "cat", "sat"], k=draw.randint(1, 7))) for _ in range(4)]
    assert rouge_l(texts[0], texts[1:]) == pytest.approx(slow_rouge_l(texts[0], texts[1:]))


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("the cat sat", ["the cat sat"], 100.0),
        ("The CAT, sat!", ["the cat sat"], 100.0),
        ("jumping dogs", ["jumped dog"], 100.0),  # both stem to "jump", and "dogs" to "dog"
        ("a b c d", ["a c x"], 100 * 4 / 7),  # common: a c; precision 2/4, recall 2/3
        ("a b c d", ["x", "a c x"], 100 * 4 / 7),
        ("a b", ["c d"], 0.0),
        ("", ["a"], 0.0),
        ("a", [""], 0.0),
    ],
)
def test_rouge_l_of_hand_computed_cases(prediction, references, expected):
    assert rouge_l(prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Paris", ["paris"], True),
        ("  Paris,\n France. ", ["paris france"], True),
        ("it's", ["its"], True),
        ("Rome", ["Paris", "rome!"], True),
        ("the cat", ["cat"], False),
        ("cat", ["the cat"], False),
        ("catnap", ["cat nap"], False),
        ("...", [""], True),
    ],
)
def test_exact_match_ignores_case_punctuation_and_space_but_not_articles(prediction, references, expected):
    assert exact_match(prediction, references) is expected


@pytest.mark.parametrize("measure", [rouge_l, exact_match])
@pytest.mark.parametrize("references", [[], (), "a text instead of a list"])
def test_a_prediction_without_a_list_of_references_is_refused(measure, references):
    with pytest.raises(ValueError, match="references: "):
        measure("a", references)


@pytest.mark.parametrize(
    ("texts", "n", "distinct", "repeated"),
    [
        ([[1, 2, 3, 4, 5]], 4, 1.0, 0.0),
        ([[1, 1, 1, 1, 1, 1]], 4, 1 / 3, 2 / 3),
        ([[1, 2, 3], [1, 2, 3]], 2, 0.5, 0.0),  # the same in both texts, new in each
        ([["a", "b", "a", "b"]], 1, 0.5, 0.5),
        ([[1, 2], []], 3, 0.0, 0.0),
        ([], 4, 0.0, 0.0),
    ],
)
def test_diversity_of_hand_computed_cases(texts, n, distinct, repeated):
    assert distinct_n(texts, n) == pytest.approx(distinct)
    assert repetition_rate(texts, n) == pytest.approx(repeated)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_diversity_follows_a_slow_count(n):
    draw = random.Random(n)
    texts = [draw.choices(range(3), k=draw.randint(0, 12)) for _ in range(30)]
    grams = [[tuple(text[i : i + n]) for i in range(len(text)) if i + n <= len(text)] for text in texts]
    total = sum(map(len, grams))
    assert distinct_n(texts, n) == len(Counter(gram for text in grams for gram in text)) / total
    again = sum(gram in text[:i] for text in grams for i, gram in enumerate(text))
    assert repetition_rate(texts, n) == again / total


@pytest.mark.parametrize("measure", [distinct_n, repetition_rate])
def test_an_ngram_of_no_tokens_is_refused(measure):
    with pytest.raises(ValueError, match=r"n: .*0"):
        measure([[1, 2]], 0)
