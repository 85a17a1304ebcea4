"""What is measured on held-out data: token-level quality and generated text."""

from lit_distill.evaluation.quality import AgreementQuality, StudentQuality, TermMeans
from lit_distill.evaluation.text import distinct_n, exact_match, repetition_rate, rouge_l

__all__ = ["AgreementQuality", "StudentQuality", "TermMeans", "distinct_n", "exact_match", "repetition_rate", "rouge_l"]
