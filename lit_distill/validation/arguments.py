"""Checks on the arguments of the module."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def check_names(objectives: Iterable[str], corpus_objectives: Iterable[str]) -> None:
    """Refuse names of objectives that are missing, used twice, or not usable in names of metrics.

    Raises:
        ValueError: with the key.
    """
    names, others = list(objectives), list(corpus_objectives)
    if not names:
        raise ValueError("objectives: at least one is needed, such as `kd: ForwardKL`.")
    if both := sorted(set(names) & set(others)):
        raise ValueError(f"corpus_objectives: {both[0]!r} is also in model.objectives; give it another name.")
    for name in (*names, *others):
        if not name.isidentifier() or hasattr(nn.ModuleDict, name):
            key = "objectives" if name in names else "corpus_objectives"
            raise ValueError(
                f"{key}: {name!r} cannot be a name. Use letters, digits and _, such as `kd`, and not the name "
                "of a method of dictionaries, such as `keys`."
            )
