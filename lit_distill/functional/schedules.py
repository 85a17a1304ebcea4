"""Schedules: values as pure functions of the optimiser step."""

from __future__ import annotations

import math
from collections.abc import Mapping


def linear_schedule(step: int, start: float, end: float, steps: int) -> float:
    """Linear from ``start`` at step 0 to ``end`` at ``steps``; constant afterwards."""
    return start + (end - start) * min(1.0, step / steps)


def cosine_schedule(step: int, start: float, end: float, steps: int) -> float:
    """From ``start`` at step 0 to ``end`` at ``steps`` along half a cosine; constant afterwards."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def stepwise_schedule(step: int, start: float, values: Mapping[int, float]) -> float:
    """``start`` until the first step in ``values``, then the value of the latest step reached."""
    passed = [at for at in values if at <= step]
    return values[max(passed)] if passed else start
