"""Data passed between data module, sources, models and objectives, and the errors of their arguments."""

from lit_distill.types.arguments import (
    ArgumentError,
    arguments_of,
    begins_with_argument,
    check_sizes,
    every_error_of,
)
from lit_distill.types.batch import Batch, Prompts
from lit_distill.types.rollouts import Responses, Trajectories, join_prompts, join_responses
from lit_distill.types.sequences import Item, Pairs, Sequences, TensorRecord

__all__ = [
    "ArgumentError",
    "Batch",
    "Item",
    "Pairs",
    "Prompts",
    "Responses",
    "Sequences",
    "TensorRecord",
    "Trajectories",
    "arguments_of",
    "begins_with_argument",
    "check_sizes",
    "every_error_of",
    "join_prompts",
    "join_responses",
]
