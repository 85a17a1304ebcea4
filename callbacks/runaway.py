"""Detects a student that runs away from its teacher: longer and longer responses, or other and other tokens."""

from __future__ import annotations

from typing import Any

LONGER, MUCH_LONGER = 2.0, 4.0
"""Times the first mean length: the first counts with more unfinished responses, the second alone."""
MORE_UNFINISHED = 0.2
NEVER_ENDS, DID_END = 0.95, 0.6
"""Unfinished share at which hardly a response ends, and the first one at which many did: a length near the limit cannot double."""
OVERLAP_KEPT = 2 / 3
"""Share of the highest overlap below which, or at which, it has fallen too far."""
ADVICE = (
    "Lower model.optimizer.lr; add the objective ReferenceKL with a model.reference, so that the student stays close to it; use "
    "TopKReverseKL, whose top k are renormalised; or leave special tokens out with model.targets.skip_special_tokens."
)


class RunawayDetector:
    """Warns once of responses that grow, and once of a falling overlap with the teacher, over the validations of a run."""

    def __init__(self) -> None:
        self.first: list[float] | None = None
        """Mean length and unfinished share of the first validation."""
        self.highest_overlap: float | None = None
        self.warned: list[str] = []

    def check(self, step: int, length: float, unfinished: float, overlap: float | None) -> list[str]:
        """Add the metrics of a validation; returns the warnings that are new.

        Args:
            step: the optimiser step.
            length: mean tokens of a response.
            unfinished: share of the responses that were cut off, in [0, 1].
            overlap: share of the top tokens that student and teacher have in common, in [0, 1]; None without a teacher.
        """
        warnings = {"length": self._length(step, length, unfinished), "overlap": self._overlap(step, overlap)}
        new = {kind: text for kind, text in warnings.items() if text is not None and kind not in self.warned}
        self.warned += new
        return list(new.values())

    def _length(self, step: int, length: float, unfinished: float) -> str | None:
        if self.first is None:
            self.first = [length, unfinished]
        before, cut_off = self.first
        grown = length > LONGER * before and unfinished >= cut_off + MORE_UNFINISHED
        endless = unfinished >= NEVER_ENDS and cut_off < DID_END and length > before
        if not (grown or endless) and length <= MUCH_LONGER * before:
            return None
        return (
            f"The student's responses run away at step {step}. First validation -> now: length {before:.1f} -> {length:.1f} "
            f"tokens, unfinished {cut_off:.0%} -> {unfinished:.0%}. {ADVICE}"
        )

    def _overlap(self, step: int, overlap: float | None) -> str | None:
        if overlap is None:
            return None
        self.highest_overlap = max(overlap, self.highest_overlap or 0.0)
        if overlap == self.highest_overlap or overlap > OVERLAP_KEPT * self.highest_overlap:
            return None
        return (
            f"The student runs away from the teacher at step {step}. Highest -> now: the overlap of their most probable tokens "
            f"{self.highest_overlap:.0%} -> {overlap:.0%}. {ADVICE}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What later validations are compared with."""
        return {"first": self.first, "highest_overlap": self.highest_overlap, "warned": self.warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the validations of the interrupted run."""
        self.first, self.highest_overlap, self.warned = state["first"], state["highest_overlap"], list(state["warned"])
