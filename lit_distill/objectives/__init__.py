"""Objectives (losses), combined in YAML. They depend on neither Lightning nor transformers."""

from lit_distill.objectives.aggregate import add_terms, term_means, weighted_sum
from lit_distill.objectives.base import (
    LossTerm,
    Objective,
    check_needs,
    metric_names,
    probe,
    sum_over_tokens,
)
from lit_distill.objectives.divergences import (
    AdaptiveKL,
    ForwardKL,
    JensenShannon,
    NextToken,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from lit_distill.objectives.on_policy import (
    EntropyGatedKL,
    ExtrapolatedReverseKL,
    ReferenceKL,
    SampledReverseKL,
    TopKForwardKL,
    TopKReverseKL,
)
from lit_distill.objectives.policy_gradient import PolicyGradient
from lit_distill.objectives.preference import DirectPreference, TokenPreference
from lit_distill.objectives.signals import (
    PAIR_SIGNALS,
    REFERENCE_SIGNALS,
    SIGNALS,
    TEACHER_OF_PAIRS,
    TEACHER_SIGNALS,
    Accuracy,
    Signal,
)

__all__ = [
    "PAIR_SIGNALS",
    "REFERENCE_SIGNALS",
    "SIGNALS",
    "TEACHER_OF_PAIRS",
    "TEACHER_SIGNALS",
    "Accuracy",
    "AdaptiveKL",
    "DirectPreference",
    "EntropyGatedKL",
    "ExtrapolatedReverseKL",
    "ForwardKL",
    "JensenShannon",
    "LossTerm",
    "NextToken",
    "Objective",
    "PolicyGradient",
    "ReferenceKL",
    "ReverseKL",
    "SampledReverseKL",
    "Signal",
    "SkewForwardKL",
    "SkewReverseKL",
    "TokenPreference",
    "TopKForwardKL",
    "TopKReverseKL",
    "TotalVariation",
    "add_terms",
    "check_needs",
    "metric_names",
    "probe",
    "sum_over_tokens",
    "term_means",
    "weighted_sum",
]
