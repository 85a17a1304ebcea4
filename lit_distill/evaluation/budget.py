"""The budget for requests to an endpoint, and a tracker that never exceeds it."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """The limits of a run for requests to an endpoint; answers from the cache are free."""

    max_requests: int | None = None
    """Maximum number of requests, however many attempts each of them needs; null for no limit."""
    max_cost: float | None = None
    """Maximum cost, in the currency of the prices; null for no limit.

    It is not exceeded as long as the endpoint respects the maximum number of tokens of an answer: a request is sent only if the
    rest of the budget suffices for all its attempts, each of which may be charged although its answer is lost.
    """
    price_per_million_input_tokens: float = 0.0
    """Price of the endpoint for a million prompt tokens."""
    price_per_million_output_tokens: float = 0.0
    """Price of the endpoint for a million generated tokens."""

    def __post_init__(self) -> None:
        if self.max_requests is not None and self.max_requests < 0:
            raise ValueError(f"max_requests: expected 0 or more, got {self.max_requests}.")
        prices = (self.price_per_million_input_tokens, self.price_per_million_output_tokens)
        if min(prices) < 0:
            raise ValueError(f"price_per_million_input_tokens, _output_tokens: expected 0 or more, got {prices}.")
        if self.max_cost is not None and not (self.max_cost >= 0 and max(prices) > 0):
            raise ValueError(
                f"max_cost: expected 0 or more and a price > 0, got {self.max_cost} and the prices {prices}. Set "
                "price_per_million_input_tokens and price_per_million_output_tokens."
            )

    def price(self, input_tokens: int, output_tokens: int) -> float:
        """The cost of the tokens, in the currency of the prices."""
        by_input = self.price_per_million_input_tokens * input_tokens
        return (by_input + self.price_per_million_output_tokens * output_tokens) / 1e6


class CostTracker:
    """Tracks what has been spent of a budget; safe to use from several threads.

    Args:
        budget: the limits.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.requests = self.input_tokens = self.output_tokens = 0
        self.cost = 0.0
        self.exhausted = False
        self._reserved: list[float] = []
        self._changed = threading.Condition()

    def spent(self) -> dict[str, float]:
        """Number of requests, of tokens as counted by the endpoint, and the cost, by name."""
        names = ("requests", "input_tokens", "output_tokens", "cost")
        return {name: getattr(self, name) for name in names}

    def reserve(self, most: float) -> bool:
        """Reserve the cost of one request, at most ``most``; False if it would exceed the budget, then also for all later calls.

        Waits for pending requests if the budget may suffice after they have cost less than reserved.
        """
        limit = self.budget

        def affordable() -> bool:
            return limit.max_cost is None or self.cost + sum(self._reserved) + most <= limit.max_cost

        with self._changed:
            self._changed.wait_for(lambda: self.exhausted or affordable() or not self._reserved)
            left = limit.max_requests is None or self.requests < limit.max_requests
            self.exhausted = self.exhausted or not (left and affordable())
            if self.exhausted:
                self._changed.notify_all()
                return False
            self.requests += 1
            self._reserved.append(most)
            return True

    def settle(self, most: float, input_tokens: int, output_tokens: int, cost: float) -> None:
        """Replace the reserved ``most`` by the real tokens and cost of a finished request."""
        with self._changed:
            self._reserved.remove(most)
            self.input_tokens += input_tokens
            self.output_tokens += output_tokens
            self.cost += cost
            self._changed.notify_all()
