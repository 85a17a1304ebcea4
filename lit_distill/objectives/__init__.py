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

__all__ = [
    "TOKEN_SIGNALS",
    "AdaptiveKL",
    "ForwardKL",
    "JensenShannon",
    "LossTerm",
    "NextToken",
    "Objective",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "TotalVariation",
    "check_needs",
    "probe",
    "sum_over_tokens",
]
