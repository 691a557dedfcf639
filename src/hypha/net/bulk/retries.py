"""When a transfer is tried again, after which pause, and when not any more. Who asks for another one when
this one has failed, of another peer or of another scheduler, decides that itself.

A receiver that is busy may be a parameter server that is being restored, and whoever comes late to it is left
out of its first round: so it is asked again for a while. A connection that was cut is tried again a few
times, and anew whenever something came over it. Whoever needs a file delivered to a peer that may come back
has ``patience_s``: so long is a peer tried that cannot be reached, or that knows of no such job yet.
"""

from __future__ import annotations

from hypha.backoff import Backoff
from hypha.errors import NetworkError, Refused

#: Attempts without progress before a transfer fails.
MAX_ATTEMPTS = 3
#: A peer that is busy is asked again for so long, and after pauses no longer than that.
BUSY_FOR_S = 40.0
FIRST_BUSY_PAUSE_S, LONGEST_BUSY_PAUSE_S = 0.2, 1.0
#: How long a receiver is asked again that knows of no such job.
NOT_FOUND_FOR_S = 10.0
#: After an attempt that broke.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.4, 15.0


class Retries:
    """Of one transfer, on its way for whoever has ``patience_s``. Times are of one monotonic clock."""

    def __init__(self, patience_s: float = 0.0) -> None:
        self._patience_s = patience_s
        self._best = 0
        self._broken_since = 0.0
        self._refused_since: float | None = None
        self._busy = Backoff(FIRST_BUSY_PAUSE_S, LONGEST_BUSY_PAUSE_S)
        self._broken = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)

    def refused(self, refusal: Refused, now: float) -> float:
        """Seconds to wait before the next attempt; raises ``refusal`` when there is none."""
        since = self._refused_since = now if self._refused_since is None else self._refused_since
        if now >= since + self._patience_with(refusal):
            raise refusal
        return self._busy.next_s()

    def _patience_with(self, refusal: Refused) -> float:
        if refusal.code == "busy":
            # a place is waited for in any case
            return max(BUSY_FOR_S, self._patience_s)
        if refusal.code == "not-found":
            # the receiver's job may be about to start
            return min(NOT_FOUND_FOR_S, self._patience_s)
        return self._patience_s if refusal.retryable else 0.0

    def broke(self, failure: NetworkError, now: float, offset: int = 0) -> float:
        """As :meth:`refused`, after an attempt broke that began at byte ``offset``."""
        self._refused_since = None
        self._busy.reset()
        if self._broken.failures == 0 or offset > self._best:
            self._broken.reset()
            self._broken_since = now
        self._best = max(self._best, offset)
        pause_s = self._broken.next_s()
        if self._broken.failures >= MAX_ATTEMPTS and now + pause_s > self._broken_since + self._patience_s:
            raise failure
        return pause_s
