"""What is measured on a text: objectives that compose in YAML. They know neither Lightning nor transformers."""

from lit_distill.objectives.base import (
    PAIR_SIGNALS,
    TEACHER_OF_PAIRS,
    TOKEN_SIGNALS,
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
from lit_distill.objectives.policy_gradient import PolicyGradient
from lit_distill.objectives.preference import DirectPreference, TokenPreference
from lit_distill.objectives.terms import add_terms, term_means, weighted_sum

__all__ = [
    "PAIR_SIGNALS",
    "TEACHER_OF_PAIRS",
    "TOKEN_SIGNALS",
    "AdaptiveKL",
    "DirectPreference",
    "ForwardKL",
    "JensenShannon",
    "LossTerm",
    "NextToken",
    "Objective",
    "PolicyGradient",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "TokenPreference",
    "TotalVariation",
    "add_terms",
    "check_needs",
    "metric_names",
    "probe",
    "sum_over_tokens",
    "term_means",
    "weighted_sum",
]
