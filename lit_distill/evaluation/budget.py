"""What asking an endpoint may cost, and an account that never goes beyond it."""

from __future__ import annotations

import threading
from dataclasses import dataclass

KEY = "Judge.budget"


@dataclass(frozen=True)
class Budget:
    """What a run may spend on questions; answers from the cache are free."""

    max_requests: int | None = None
    """Most requests, repeated attempts included."""
    max_cost: float | None = None
    """Most money, in the currency of the prices. It is kept if the endpoint keeps to the limit on an answer's tokens."""
    price_per_million_input_tokens: float = 0.0
    """Of the endpoint."""
    price_per_million_output_tokens: float = 0.0
    """Of the endpoint."""

    def __post_init__(self) -> None:
        if self.max_requests is not None and self.max_requests < 0:
            raise ValueError(f"{KEY}.max_requests: expected 0 or more, got {self.max_requests}.")
        prices = (self.price_per_million_input_tokens, self.price_per_million_output_tokens)
        if min(prices) < 0:
            raise ValueError(f"{KEY}: expected prices of 0 or more, got {prices}.")
        if self.max_cost is not None and not (self.max_cost >= 0 and max(prices) > 0):
            raise ValueError(
                f"{KEY}.max_cost: {self.max_cost} with prices of {prices} per million tokens. Set "
                "price_per_million_input_tokens and price_per_million_output_tokens."
            )

    def price(self, input_tokens: int, output_tokens: int) -> float:
        """What so many tokens cost."""
        by_input = self.price_per_million_input_tokens * input_tokens
        return (by_input + self.price_per_million_output_tokens * output_tokens) / 1e6


class Account:
    """What has been spent of a budget; several threads may draw on it.

    Args:
        budget: not to be exceeded.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.requests = self.input_tokens = self.output_tokens = 0
        self.cost = 0.0
        self.exhausted = False
        self._under_way: list[float] = []
        self._changed = threading.Condition()

    def spent(self) -> dict[str, float]:
        """Requests, tokens as the endpoint counts them, and cost."""
        names = ("requests", "input_tokens", "output_tokens", "cost")
        return {name: getattr(self, name) for name in names}

    def reserve(self, most: float) -> bool:
        """Take leave for one request that costs ``most`` at most; False once that would be too much, and ever after.

        Waits while requests under way may turn out cheaper than feared.
        """
        limit = self.budget
        with self._changed:
            while not self.exhausted:
                if limit.max_requests is not None and self.requests >= limit.max_requests:
                    self.exhausted = True
                elif limit.max_cost is None or self.cost + sum(self._under_way) + most <= limit.max_cost:
                    self.requests += 1
                    self._under_way.append(most)
                    return True
                elif self._under_way:
                    self._changed.wait()
                else:
                    self.exhausted = True
            self._changed.notify_all()
            return False

    def settle(self, most: float, input_tokens: int, output_tokens: int, cost: float) -> None:
        """Give back what was reserved, for what the request has really cost."""
        with self._changed:
            self._under_way.remove(most)
            self.input_tokens += input_tokens
            self.output_tokens += output_tokens
            self.cost += cost
            self._changed.notify_all()
