"""What is measured on a text: objectives that compose in YAML. They know neither Lightning nor transformers."""

from lit_distill.objectives.base import TOKEN_SIGNALS, LossTerm, Objective, check_needs, probe, sum_over_tokens
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
from lit_distill.objectives.preference import TokenPreference

__all__ = [
    "TOKEN_SIGNALS",
    "AdaptiveKL",
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
    "check_needs",
    "probe",
    "sum_over_tokens",
]
