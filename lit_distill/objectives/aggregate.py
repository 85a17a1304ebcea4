"""Weighted sum of several objectives, and their means over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lit_distill.objectives.base import LossTerm, Objective


def add_terms(a: LossTerm, b: LossTerm) -> LossTerm:
    """Add the terms of one objective on two disjoint parts of the items."""
    return LossTerm(
        a.total + b.total, a.count + b.count, {name: a.metrics[name] + b.metrics[name] for name in a.metrics}
    )


def weighted_sum(
    objectives: Mapping[str, Objective], factors: Mapping[str, Tensor | float], signals: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, LossTerm]]:
    """The weighted sum of the objectives, ``[]`` with its graph, and the detached term of each objective.

    Args:
        objectives: by name.
        factors: factor of each objective's total, a number or a scalar tensor.
        signals: of the items, by name; each objective gets the signals that it needs.

    Raises:
        ValueError: if an objective modifies a signal in place, or if its total does not depend on the student (checked only while
            gradients are enabled).
    """
    loss = next(iter(signals.values())).new_zeros((), dtype=torch.float32)
    terms: dict[str, LossTerm] = {}
    for name, objective in objectives.items():
        given = {signal: signals[signal] for signal in objective.needs}
        versions = _versions(given)
        term = objective(**given)
        if touched := [signal for signal, version in _versions(given).items() if version != versions[signal]]:
            raise ValueError(
                f"objectives.{name}: {type(objective).__name__} modifies `{touched[0]}` in place, but other "
                "objectives use it too. Make a new tensor instead: `x = x / 2`, not `x /= 2`."
            )
        if torch.is_grad_enabled() and not term.total.requires_grad:
            raise ValueError(
                f"objectives.{name}: the total does not depend on the student, so it has no gradient. "
                "Compute it from the student's signals, without detach()."
            )
        loss = loss + factors[name] * term.total
        terms[name] = LossTerm(term.total.detach(), term.count, {k: v.detach() for k, v in term.metrics.items()})
    return loss, terms


def term_means(
    terms: Mapping[str, LossTerm], counts: Mapping[str, Tensor], sum_over_ranks: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Means of the objectives and, as ``objective/metric``, of their metrics, ``[]`` float32, over the items of all ranks.

    Args:
        terms: sums of this rank, by name; ``objective/teacher`` for the part of an objective that belongs to one of several
            teachers, which is divided by its own count and is NaN without items.
        counts: number of items over all ranks, by name.
        sum_over_ranks: sums a tensor over all ranks.
    """
    sums = {name: term.total for name, term in terms.items()}
    sums |= {f"{name}/{metric}": v for name, term in terms.items() for metric, v in term.metrics.items()}
    values = list(sums.values())
    parts = {name: torch.as_tensor(term.count, device=values[0].device) for name, term in terms.items() if "/" in name}
    totals = sum_over_ranks(torch.stack([value.double() for value in (*values, *parts.values())]))
    known = {**counts, **dict(zip(parts, totals[len(sums) :], strict=True))}
    pairs = zip(sums, totals, strict=False)
    return {
        name: (total / (known[name] if name in parts else known[name.split("/")[0]].clamp(min=1))).float()
        for name, total in pairs
    }


def _versions(signals: Mapping[str, Tensor]) -> dict[str, int]:
    """How often each signal was modified in place. Inference tensors have no such counter and are left out."""
    return {name: signal._version for name, signal in signals.items() if not signal.is_inference()}
