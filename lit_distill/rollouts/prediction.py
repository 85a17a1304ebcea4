"""What `lit-distill predict` writes: responses of the student, or of the teacher to make SeqKD data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_distill.rollouts.decoding import Decoding


@dataclass
class Prediction(Decoding):
    """Who speaks in `predict`, how, and where it is written."""

    speaker: Literal["student", "teacher"] = "student"
    """Whose responses."""
    path: str = "predictions.jsonl"
    """JSONL file of id, prompt (as the model reads it), response and references. An existing file is continued."""
    logprobs: bool = False
    """Also write the tokens and their log-probabilities (at the temperature, or 1 if greedy; before truncation)."""
    seed: int = 0
    """Of the draws at temperature > 0; together with an item's id it fixes the response."""
