"""Metrics of generated text: ROUGE-L and exact match against references, and distinct-n and repetition without them."""

from __future__ import annotations

import string
from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Longest common subsequence of stemmed words with the closest reference, as F1.

    Words are runs of a-z and 0-9 after lower-casing, as in the original ROUGE: text in other scripts scores 0.

    Args:
        prediction: the generated text.
        references: the accepted texts, at least one.

    Returns:
        0 to 100; the highest over the references.

    Raises:
        ValueError: if there is no reference.

    Source: rouge_score's ``rougeL`` with stemmer, as MiniLLM and DPKD report it.
    """
    _check_references(references)
    return 100.0 * float(_rouge_scorer().score_multi(references, prediction)["rougeL"].fmeasure)


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the text is one of the references, apart from case, ASCII punctuation and extra white space.

    Unlike in SQuAD's metric of the same name, articles are not removed.

    Args:
        prediction: the generated text.
        references: the accepted texts, at least one.

    Returns:
        True if any reference matches.

    Raises:
        ValueError: if there is no reference.

    Source: MiniLLM's evaluation.
    """
    _check_references(references)
    normalized = _normalized(prediction)
    return any(normalized == _normalized(reference) for reference in references)


def distinct_n(texts: Iterable[Sequence[Hashable]], n: int = 4) -> float:
    """Number of different n-grams divided by the number of all n-grams of a collection of texts: its diversity.

    The value falls as the collection grows, so only compare collections of equal size.

    Args:
        texts: one sequence of tokens (ids or words) per text.
        n: tokens per n-gram, >= 1; MiniLLM reports 4.

    Returns:
        0 to 1; 0 if no text has n tokens.

    Raises:
        ValueError: if n < 1.

    Source: Li et al. 2016, https://arxiv.org/abs/1510.03055.
    """
    all_ngrams = [ngram for text in texts for ngram in _ngrams(text, n)]
    return len(set(all_ngrams)) / len(all_ngrams) if all_ngrams else 0.0


def repetition_rate(texts: Iterable[Sequence[Hashable]], n: int = 4) -> float:
    """Share of n-grams that occur earlier in the same text, over a collection: near 1 if the generation repeats itself.

    Unlike `distinct_n`, it does not grow with the number of texts.

    Args:
        texts: one sequence of tokens (ids or words) per text.
        n: tokens per n-gram, >= 1.

    Returns:
        0 to 1; 0 if no text has n tokens.

    Raises:
        ValueError: if n < 1.

    Source: Welleck et al. 2020, https://arxiv.org/abs/1908.04319, where it is averaged over texts.
    """
    _check_size(n)
    texts = list(texts)
    num_all = sum(max(0, len(text) - n + 1) for text in texts)
    return sum(count_repeated(text, n) for text in texts) / num_all if num_all else 0.0


def count_repeated(text: Sequence[Hashable], n: int) -> int:
    """Number of n-grams of ``text`` that also occur earlier in it."""
    ngrams = list(_ngrams(text, n))
    return len(ngrams) - len(set(ngrams))


@cache
def _rouge_scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer  # slow to import: loads nltk

    return RougeScorer(["rougeL"], use_stemmer=True)


def _normalized(text: str) -> str:
    return " ".join(text.lower().translate(WITHOUT_PUNCTUATION).split())


def _ngrams(text: Sequence[Hashable], n: int) -> Iterable[tuple[Hashable, ...]]:
    _check_size(n)
    return zip(*(islice(text, start, None) for start in range(n)), strict=False)


def _check_size(n: int) -> None:
    if n < 1:
        raise ValueError(f"n: expected at least 1 token per n-gram, got {n}.")


def _check_references(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise ValueError(f"references: expected a list of at least one accepted text, got {references!r}.")
