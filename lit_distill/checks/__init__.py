"""What is refused, in the order of a run: the command line, the module's arguments, what begins, and what comes out."""

from lit_distill.checks.arguments import check_names, check_sizes
from lit_distill.checks.callbacks import check_callback_classes
from lit_distill.checks.command import check_seed, check_trainer_options, check_writable
from lit_distill.checks.fit import check_fit, check_strategy, check_trainer
from lit_distill.checks.monitors import logged_metrics
from lit_distill.checks.run_length import has_validation
from lit_distill.checks.values import check_finite, check_same_model

__all__ = [
    "check_callback_classes",
    "check_finite",
    "check_fit",
    "check_names",
    "check_same_model",
    "check_seed",
    "check_sizes",
    "check_strategy",
    "check_trainer",
    "check_trainer_options",
    "check_writable",
    "has_validation",
    "logged_metrics",
]
