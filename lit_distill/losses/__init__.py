"""Objectives evaluated on hidden states, a chunk of logits at a time."""

from lit_distill.losses.chunked import ChunkedTokenLoss
from lit_distill.losses.evaluator import ObjectiveEvaluator, global_counts

__all__ = ["ChunkedTokenLoss", "ObjectiveEvaluator", "global_counts"]
