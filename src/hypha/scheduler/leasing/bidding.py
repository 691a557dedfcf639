"""What a scheduler bids for a worker, as a pure machine: :class:`Bidding`, a part of its allocator.

The bid is public, the maximum is not. While workers are missing the bid rises, by a share of what lies
between the two each time; once all are held it is what it was. What was paid for a lease stays its price.
"""

from __future__ import annotations

import math

from hypha.scheduler.leasing.events import Search


class Bidding:
    """For one ask. Raises ValueError where its numbers make no sense."""

    def __init__(self, ask: Search) -> None:
        if not (math.isfinite(ask.bid) and math.isfinite(ask.max_price) and 0 <= ask.bid <= ask.max_price):
            raise ValueError(
                f"a bid of {ask.bid} with a maximum of {ask.max_price} for {ask.kind} jobs: both must be "
                "finite, 0 or more, and the bid no more than the maximum"
            )
        if ask.raise_after_s is not None and not (ask.raise_after_s > 0 and 0 < ask.raise_by <= 1):
            raise ValueError(
                f"a bid cannot be raised every {ask.raise_after_s} s by a share of {ask.raise_by}: both must "
                "be over 0, and the share is 1 at most"
            )
        self._ask = ask
        #: how often it was raised
        self.raised = 0
        #: when it is raised next, while workers are missing
        self.raise_at: float | None = None

    @property
    def bid(self) -> float:
        """What is published now."""
        ask = self._ask
        risen = ask.bid + min(1.0, self.raised * ask.raise_by) * (ask.max_price - ask.bid)
        return min(ask.max_price, risen)

    def follow(self, complete: bool, missing: bool, now: float) -> bool:
        """All workers are held (``complete``), or some are ``missing``: not even an offer was accepted.
        Whether the bid was raised now.
        """
        after_s = self._ask.raise_after_s
        if complete or after_s is None:
            self.raised, self.raise_at = 0, None
            return False
        if self.bid >= self._ask.max_price:
            self.raise_at = None
            return False
        if self.raise_at is None:
            self.raise_at = now + after_s
        if not missing or now < self.raise_at:
            return False
        self.raised += 1
        self.raise_at = now + after_s if self.bid < self._ask.max_price else None
        return True

    def validate(self) -> None:
        """Assert what always holds. For tests and simulation."""
        assert self._ask.bid <= self.bid <= self._ask.max_price, f"{self.bid} is bid"
        assert self.raise_at is None or self.bid < self._ask.max_price, "the maximum is to be raised"
