"""Validation before weights load: command line, module arguments, run settings; then checks on loaded weights and losses."""

from lit_distill.validation.arguments import check_constructed, check_names
from lit_distill.validation.callbacks import check_callback_classes
from lit_distill.validation.command import check_seed, check_trainer_options, check_writable
from lit_distill.validation.context_length import check_lengths, check_tokens
from lit_distill.validation.fit import check_fit, check_strategy, check_trainer
from lit_distill.validation.monitors import logged_metrics
from lit_distill.validation.references import check_references
from lit_distill.validation.run_length import has_validation
from lit_distill.validation.values import check_finite, check_same_model

__all__ = [
    "check_callback_classes",
    "check_constructed",
    "check_finite",
    "check_fit",
    "check_lengths",
    "check_names",
    "check_references",
    "check_same_model",
    "check_seed",
    "check_strategy",
    "check_tokens",
    "check_trainer",
    "check_trainer_options",
    "check_writable",
    "has_validation",
    "logged_metrics",
]
