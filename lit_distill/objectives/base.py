"""Interface of objectives: the arguments of `__init__` are set in YAML, those of `forward` are the signals it needs.

An objective returns sums, never means. One place, `lit_distill.module`, divides every sum by its own count over all
micro-batches and ranks, so objectives on tokens and on pairs can be combined, and the split into micro-batches never changes
the loss.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_distill.objectives.signals import (
    PAIR_SIGNALS,
    REFERENCE_SIGNALS,
    SIGNALS,
    TEACHER_SIGNALS,
    Accuracy,
    random_signals,
)
from lit_distill.types import ArgumentError


class LossTerm(NamedTuple):
    """Result of an objective on some items: sums and their count."""

    total: Tensor
    """[] nats summed over the counted items; carries the graph."""
    count: Tensor | int  # type: ignore[assignment]  # hides tuple.count, which is not used
    """Number of items in ``total``: tokens or pairs. Return `len(labels)` if all rows count. If the count depends on values, return
    a tensor: it is exact too, but costs one extra pass over the batch before each step."""
    metrics: Mapping[str, Tensor] = {}
    """[] each: detached sums over the same items, logged as `train/<objective>/<metric>`."""


class Objective(nn.Module):
    """A loss. Subclass it: take the settings in `__init__` and the signals in `forward`.

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

    valid_on_any_text: bool = True
    """Whether its value means something on texts of others too, such as those of a validation."""

    @property
    def needs(self) -> frozenset[str]:
        """The names of the signals that `forward` takes."""
        return frozenset(inspect.signature(self.forward).parameters)

    @property
    def teacher_tokens(self) -> int:
        """How many of the teacher's most probable tokens have to be known by their probability; 0 if any number will do."""
        return 0

    @property
    def accepts_teacher(self) -> frozenset[Accuracy]:
        """How exact the teacher's logits have to be.

        Add ``truncated`` if it is finite where the teacher has probability 0, and ``drawn`` if its gradient is linear in the
        teacher's probabilities.
        """
        return frozenset({"exact", "spread"})

    @property
    def on_pairs(self) -> bool:
        """Whether it is computed on pairs of responses rather than on tokens."""
        return bool(self.needs & PAIR_SIGNALS)


def sum_over_tokens(values: Tensor, **metrics: Tensor) -> LossTerm:
    """The term of an objective that counts every row: ``values`` and each metric are ``[N]``."""
    return LossTerm(values.sum(), len(values), {name: rows.detach().sum() for name, rows in metrics.items()})


def check_needs(objectives: Mapping[str, Objective], provided: Iterable[str], key: str, provider: str) -> None:
    """Check that every signal that the objectives need is provided, before any weights load.

    Args:
        objectives: by name in the YAML.
        provided: names of the available signals.
        key: the argument that gives the objectives, such as ``objectives``.
        provider: what provides the signals, for the message.

    Raises:
        ValueError: with the objective, the missing signal, the available signals and what to do.
    """
    provided = frozenset(provided)
    for name, objective in objectives.items():
        if objective.on_pairs and not objective.needs <= PAIR_SIGNALS:
            raise ValueError(
                f"{key}.{name}: {type(objective).__name__} needs signals of pairs and of tokens at once: "
                f"{', '.join(sorted(objective.needs))}. Split it into two objectives."
            )
        for signal in sorted(objective.needs):
            if signal in provided:
                continue
            title = f"{key}.{name}: {type(objective).__name__} needs `{signal}`"
            if signal not in SIGNALS:
                close = get_close_matches(signal, SIGNALS, n=1)
                hint = f" Did you mean `{close[0]}`?" if close else ""
                raise ValueError(f"{title}, which is not a signal.{hint} Signals: {', '.join(SIGNALS)}.")
            if signal in REFERENCE_SIGNALS:
                raise ValueError(
                    f"{title}, but there is no reference model. Set model.reference.path, for example to the student's path."
                )
            if objective.needs - provided <= TEACHER_SIGNALS | REFERENCE_SIGNALS:
                raise ValueError(f"{title}, but there is no teacher. Set model.teacher.path.")
            if signal in PAIR_SIGNALS:
                raise ValueError(
                    f"{title}: it works on pairs, but {provider} provides single responses. Set source: ResponsePairs."
                )
            raise ValueError(f"{title}, which {provider} does not provide. It provides: {', '.join(sorted(provided))}.")


def probe(objective: Objective, vocabulary_size: int, key: str) -> bool:
    """Run an objective on three rows (or pairs) of random signals; returns whether its count depends on their values.

    Raises:
        ValueError: if what it returns is not a `LossTerm` of scalar sums.
    """
    signals = random_signals(sorted(objective.needs), vocabulary_size)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            term = objective(**signals)
    except ArgumentError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        given = ", ".join(f"{name} {list(signal.shape)}" for name, signal in signals.items())
        raise ValueError(f"{key}: forward failed on three rows ({given}): {type(error).__name__}: {error}") from error
    if not isinstance(term, LossTerm):
        raise ValueError(f"{key}: forward returned {type(term).__name__}; return LossTerm(total, count, metrics).")
    for name, value in {"total": term.total, **{f"metrics[{m!r}]": v for m, v in term.metrics.items()}}.items():
        if not isinstance(value, Tensor) or value.ndim:
            shape = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{key}: {name} has {shape}; return the sum over the rows, a tensor without dimensions.")
    if not isinstance(term.count, int) and (not isinstance(term.count, Tensor) or term.count.ndim):
        raise ValueError(f"{key}: count must be an int or a tensor without dimensions, got {term.count!r}.")
    if isinstance(term.count, int) and term.count != 3:
        raise ValueError(
            f"{key}: counted {term.count} of 3 rows as an int. Return len(rows), or a tensor if the count depends on values."
        )
    return isinstance(term.count, Tensor)


def metric_names(objective: Objective) -> list[str] | None:
    """Names of the metrics that an objective returns; None if it fails on random signals."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return list(objective(**random_signals(sorted(objective.needs), vocabulary_size=8)).metrics)
    except Exception:  # noqa: BLE001 - a user's objective may raise anything; `probe` reports it
        return None
