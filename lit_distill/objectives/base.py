"""The contract of an objective: `__init__` is its YAML, the parameters of `forward` are the signals it needs.

An objective returns sums, never means. One place, `lit_distill.module`, divides every sum by its own count over all
micro-batches and ranks, so that tokens, sequences and pairs mix safely and the split of a batch never changes the loss.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor, nn

TOKEN_SIGNALS: Mapping[str, str] = {
    "student_logits": "[N, V] float32, carries the gradient",
    "teacher_logits": "[N, V] float32, constant",
    "labels": "[N] int64, the token that follows",
    "old_logprobs": "[N] float32, log q of the label when it was sampled",
    "teacher_logprobs": "[N] float32, log p of the label",
    "advantages": "[N] float32, constant",
    "importance_weights": "[N] float32, constant: what undoes the sampler in the Long term",
    "single_step_weights": "[N] float32, constant: what undoes the sampler in the Single term",
}
"""What a token-level objective may ask for: N rows, each a valid target position; row t scores target t."""


PAIR_SIGNALS: Mapping[str, str] = {
    "student_chosen_logprobs": "[B, T] float32, log q of the preferred text's tokens; carries the gradient",
    "student_rejected_logprobs": "[B, T] float32, log q of the other text's tokens; carries the gradient",
    "teacher_chosen_logprobs": "[B, T] float32, log p of the preferred text's tokens, constant",
    "teacher_rejected_logprobs": "[B, T] float32, log p of the other text's tokens, constant",
    "chosen_mask": "[B, T] bool: the response's tokens; every row has one; log-probabilities are 0 elsewhere",
    "rejected_mask": "[B, T] bool: the same for the other text",
}
"""What an objective on pairs of texts may ask for: B pairs; column t speaks of token t."""


TEACHER_OF_PAIRS = frozenset({"teacher_chosen_logprobs", "teacher_rejected_logprobs"})
"""Those of them that a teacher gives."""


class LossTerm(NamedTuple):
    """What an objective says of the items it was shown."""

    total: Tensor
    """[] nats summed over the counted items; carries the graph."""
    count: Tensor | int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    """Counted items: tokens or pairs. Give `len(labels)` where that is all the rows shown; a tensor, where it depends
    on values, is exact too, and costs a counting pass over the batch before each step."""
    metrics: Mapping[str, Tensor] = {}
    """[] each: detached sums over the same items, logged as `train/<objective>/<metric>`."""


class Objective(nn.Module):
    """What is measured on a text. Subclass it, take your settings in `__init__` and your signals in `forward`.

    Args:
        weight: factor of this objective in the loss, finite and >= 0. Weights are used as given, never normalised.

    Raises:
        ValueError: if the weight is negative or not finite.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight: expected a finite number >= 0 for {type(self).__name__}, got {weight}.")
        self.weight = float(weight)

    @property
    def needs(self) -> frozenset[str]:
        """The names of the signals that `forward` takes."""
        return frozenset(inspect.signature(self.forward).parameters)

    @property
    def on_pairs(self) -> bool:
        """Whether it measures pairs of texts rather than single tokens."""
        return bool(self.needs & PAIR_SIGNALS.keys())


def sum_over_tokens(values: Tensor, **metrics: Tensor) -> LossTerm:
    """The term of an objective that counts every row: ``values`` and each metric are ``[N]``."""
    return LossTerm(values.sum(), len(values), {name: rows.detach().sum() for name, rows in metrics.items()})


def check_needs(objectives: Mapping[str, Objective], provided: Iterable[str], key: str, provider: str) -> None:
    """Compare what objectives need with what there is, before any weights load.

    Args:
        objectives: by name in the YAML.
        provided: the signals there are.
        key: where the objectives stand in the YAML, such as ``model.objectives``.
        provider: what gives the signals, for the message.

    Raises:
        ValueError: naming the objective, the signal, what there is and what to do.
    """
    provided = frozenset(provided)
    for name, objective in objectives.items():
        if objective.on_pairs and not objective.needs <= PAIR_SIGNALS.keys():
            raise ValueError(
                f"{key}.{name}: {type(objective).__name__} asks for signals of pairs and of tokens at once: "
                f"{', '.join(sorted(objective.needs))}. Make two objectives of it."
            )
        for signal in sorted(objective.needs):
            if signal in provided:
                continue
            title = f"{key}.{name}: {type(objective).__name__} needs `{signal}`"
            known = {**TOKEN_SIGNALS, **PAIR_SIGNALS}
            if signal == "teacher_logits" or (objective.on_pairs and objective.needs - provided == TEACHER_OF_PAIRS):
                raise ValueError(f"{title}, but there is no teacher. Set model.teacher.path.")
            if signal not in known:
                close = get_close_matches(signal, known, n=1)
                hint = f" Did you mean `{close[0]}`?" if close else ""
                raise ValueError(f"{title}, which is no signal.{hint} Signals: {', '.join(known)}.")
            if signal in PAIR_SIGNALS:
                raise ValueError(
                    f"{title}: it measures pairs, and {provider} gives single texts. Set source: ResponsePairs."
                )
            raise ValueError(f"{title}, which {provider} does not provide. It provides: {', '.join(sorted(provided))}.")


def probe(objective: Objective, vocabulary_size: int, key: str) -> bool:
    """Show an objective three rows (or pairs) of random signals, and say whether its count depends on their values.

    Raises:
        ValueError: if what it returns is not a `LossTerm` of scalar sums.
    """
    signals = _random_signals(sorted(objective.needs), vocabulary_size)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            term = objective(**signals)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        given = ", ".join(f"{name} {list(signal.shape)}" for name, signal in signals.items())
        raise ValueError(f"{key}: forward failed on three rows ({given}): {type(error).__name__}: {error}") from error
    if not isinstance(term, LossTerm):
        raise ValueError(f"{key}: forward returned {type(term).__name__}; return LossTerm(total, count, metrics).")
    for name, value in {"total": term.total, **{f"metrics[{m!r}]": v for m, v in term.metrics.items()}}.items():
        if not isinstance(value, Tensor) or value.ndim:
            shape = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{key}: {name} is of {shape}; return the sum over the rows, a tensor without dimensions.")
    if not isinstance(term.count, int) and (not isinstance(term.count, Tensor) or term.count.ndim):
        raise ValueError(f"{key}: count must be an int or a tensor without dimensions, got {term.count!r}.")
    if isinstance(term.count, int) and term.count != 3:
        raise ValueError(
            f"{key}: counted {term.count} of 3 rows as an int. Return len(rows), or a tensor if the count depends on values."
        )
    return isinstance(term.count, Tensor)


def metric_names(objective: Objective) -> list[str] | None:
    """The further sums that an objective returns, by name; None if it cannot be asked without a model."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return list(objective(**_random_signals(sorted(objective.needs), vocabulary_size=8)).metrics)
    except Exception:  # noqa: BLE001 - of any class: it may be the user's own, and `probe` says what is wrong with it
        return None


def _random_signals(names: Iterable[str], vocabulary_size: int) -> dict[str, Tensor]:
    """Three rows, or pairs of four tokens, of each signal; where objectives are before they go to a device."""
    generator = torch.Generator().manual_seed(0)

    def signal(name: str) -> Tensor:
        if name.endswith("mask"):
            return torch.ones(3, 4, dtype=torch.bool)
        if name.endswith("logits"):
            return torch.randn(3, vocabulary_size, generator=generator)
        if name == "labels":
            return torch.full((3,), min(1, vocabulary_size - 1))
        return -torch.rand((3, 4) if name in PAIR_SIGNALS else (3,), generator=generator)

    with torch.device("cpu"):  # Lightning builds models inside the context of their device
        return {name: signal(name) for name in names}
