"""When a transfer is tried again, after which pause, and when not any more. Nobody else tries a file again.

A receiver that is busy may be a parameter server that is being restored, and whoever comes late to it is left
out of its first round: so it is asked again for a while. A connection that was cut is tried again a few
times, and anew whenever something came over it. Whoever needs a file delivered to a peer that may come back
has ``patience_s``: so long is a peer tried that cannot be reached, or that knows of no such job yet.
"""

from __future__ import annotations

from hypha.errors import NetworkError, Refused
from hypha.runtime import chance

#: Attempts without progress before a transfer fails.
MAX_ATTEMPTS = 3
#: A peer that is busy is asked again for so long, and after pauses no longer than that.
BUSY_FOR_S = 40.0
BUSY_PAUSE_S = 1.0
#: ``not-found`` may mean that the receiver's job is just starting.
NOT_FOUND_FOR_S = 10.0
#: The longest pause after an attempt that broke.
LONGEST_PAUSE_S = 15.0


class Retries:
    """Of one transfer, on its way for whoever has ``patience_s``. Times are of one monotonic clock."""

    def __init__(self, patience_s: float = 0.0) -> None:
        self._patience_s = patience_s
        self._failures = 0
        self._best = 0
        self._broken_since = 0.0
        self._refused_since: float | None = None
        self._busy_s = 0.1

    def refused(self, refusal: Refused, now: float) -> float:
        """Seconds to wait before the next attempt; raises ``refusal`` when there is none."""
        since = self._refused_since = now if self._refused_since is None else self._refused_since
        patience_s = {
            "busy": max(BUSY_FOR_S, self._patience_s),
            "not-found": min(NOT_FOUND_FOR_S, self._patience_s),
        }.get(refusal.code, 0.0)
        self._busy_s = min(2.0 * self._busy_s, BUSY_PAUSE_S)
        if now >= since + patience_s:
            raise refusal
        return self._busy_s * chance().uniform(0.5, 1.0)

    def broke(self, failure: NetworkError, now: float, offset: int = 0) -> float:
        """As :meth:`refused`, after an attempt broke that began at byte ``offset``."""
        self._busy_s, self._refused_since = 0.1, None
        if self._failures == 0 or offset > self._best:
            self._failures, self._broken_since = 0, now
        self._best = max(self._best, offset)
        self._failures += 1
        pause_s = min(0.2 * 2.0**self._failures, LONGEST_PAUSE_S) * chance().uniform(0.5, 1.0)
        if self._failures >= MAX_ATTEMPTS and now + pause_s > self._broken_since + self._patience_s:
            raise failure
        return pause_s
