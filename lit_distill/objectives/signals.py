"""The signals that an objective may use, in one table: name, shape, dtype and provider.

To add a signal, add a row here and compute it in its provider. N is the number of target tokens (row t predicts target t), B of
pairs, T of tokens of a response, V the size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Signal(NamedTuple):
    """One row of the table."""

    shape: tuple[str, ...]
    """Names of the dimensions."""
    provider: str
    """``text`` (any sequence), ``rollout`` (sources that score their responses), ``pair`` (sources of pairs), ``teacher``, or
    ``reference``."""
    meaning: str
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"[{', '.join(self.shape)}] {str(self.dtype).removeprefix('torch.')}: {self.meaning}"


Accuracy = Literal["exact", "spread", "truncated", "drawn"]
"""What a teacher's logits are. exact: its own. spread: exact for some tokens; the rest of the probability is spread evenly over the
others. truncated: other tokens have probability 0. drawn: frequencies of drawn tokens, whose mean is exact."""
ROW, PAIR = ("N",), ("B", "T")
SIGNALS: Mapping[str, Signal] = {
    "student_logits": Signal(("N", "V"), "text", "carries the gradient"),
    "labels": Signal(ROW, "text", "the token that follows", torch.int64),
    "teacher_logits": Signal(("N", "V"), "teacher", "constant"),
    "reference_logits": Signal(("N", "V"), "reference", "constant"),
    "old_logprobs": Signal(ROW, "rollout", "log q of the label when it was sampled"),
    "teacher_logprobs": Signal(ROW, "rollout", "log p of the label"),
    "advantages": Signal(ROW, "rollout", "constant"),
    "importance_weights": Signal(ROW, "rollout", "corrects the Long term for the sampler"),
    "single_step_weights": Signal(ROW, "rollout", "corrects the Single term for the sampler"),
    "student_chosen_logprobs": Signal(PAIR, "pair", "log q of the chosen response's tokens; carries the gradient"),
    "student_rejected_logprobs": Signal(PAIR, "pair", "log q of the rejected response's tokens; carries the gradient"),
    "teacher_chosen_logprobs": Signal(PAIR, "teacher", "log p of the chosen response's tokens"),
    "teacher_rejected_logprobs": Signal(PAIR, "teacher", "log p of the rejected response's tokens"),
    "chosen_mask": Signal(
        PAIR, "pair", "the response's tokens, at least one a row; log-probabilities are 0 elsewhere", torch.bool
    ),
    "rejected_mask": Signal(PAIR, "pair", "the same for the rejected response", torch.bool),
}
PAIR_SIGNALS = frozenset(name for name, signal in SIGNALS.items() if signal.shape == PAIR)
"""Signals of objectives on pairs; all other signals are for objectives on tokens."""
TEACHER_SIGNALS = frozenset(name for name, signal in SIGNALS.items() if signal.provider == "teacher")
REFERENCE_SIGNALS = frozenset(name for name, signal in SIGNALS.items() if signal.provider == "reference")
TEACHER_OF_PAIRS = PAIR_SIGNALS & TEACHER_SIGNALS


def random_signals(names: Iterable[str], vocabulary_size: int) -> dict[str, Tensor]:
    """Random values of each signal on the CPU, for three rows or three pairs of four tokens; used to test an objective."""
    sizes = {"N": 3, "B": 3, "T": 4, "V": vocabulary_size}
    generator = torch.Generator().manual_seed(0)

    def draw(signal: Signal) -> Tensor:
        shape = [sizes[size] for size in signal.shape]
        if signal.dtype == torch.bool:
            return torch.ones(shape, dtype=torch.bool)
        if signal.dtype == torch.int64:
            return torch.full(shape, min(1, vocabulary_size - 1))
        if "V" in signal.shape:
            return torch.randn(shape, generator=generator)
        return -torch.rand(shape, generator=generator)  # a log-probability

    with torch.device("cpu"):  # Lightning builds models inside the context of their device
        return {name: draw(SIGNALS[name]) for name in names}
