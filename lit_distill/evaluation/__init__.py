"""Metrics on held-out data: token-level metrics, metrics of generated text, calibration and exposure bias."""

from lit_distill.evaluation.calibration import Calibration, CalibrationMetric
from lit_distill.evaluation.checkers import Checker, ChoiceMatch, ExactMatch, NumberMatch
from lit_distill.evaluation.exposure_bias import StepKLMetric, step_errors, written_text
from lit_distill.evaluation.ngrams import distinct_n, exact_match, repetition_rate, rouge_l
from lit_distill.evaluation.on_policy import OnPolicyTerms, pass_at_k
from lit_distill.evaluation.quality import AgreementTerms, PerplexityTerms, TermMeanMetric
from lit_distill.evaluation.rewards import CheckerReward
from lit_distill.evaluation.text_metrics import GenerationMetrics
from lit_distill.evaluation.token_metrics import TokenMetrics
from lit_distill.evaluation.verbalizer import Verbalizer, VerbalizerTask

__all__ = [
    "AgreementTerms",
    "Calibration",
    "CalibrationMetric",
    "Checker",
    "CheckerReward",
    "ChoiceMatch",
    "ExactMatch",
    "GenerationMetrics",
    "NumberMatch",
    "OnPolicyTerms",
    "PerplexityTerms",
    "StepKLMetric",
    "TermMeanMetric",
    "TokenMetrics",
    "Verbalizer",
    "VerbalizerTask",
    "distinct_n",
    "exact_match",
    "pass_at_k",
    "repetition_rate",
    "rouge_l",
    "step_errors",
    "written_text",
]
