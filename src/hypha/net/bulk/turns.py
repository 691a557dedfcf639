"""Whose turn it is: how many transfers run at once, and when one is tried again.

Two at once fill a machine and leave remote calls quick. But a peer that does not answer, or a link that is
slow, fills nothing: its place is lent to the next in the queue, so that the dead do not hold up the living.

A receiver that is busy may be a parameter server that is being restored, and whoever comes late to it is left
out of its first round: so it is asked again for a while. A connection that was cut is tried again a few
times, and anew whenever something came over it. Whoever needs a file delivered to a peer that may come back
has ``patience_s``: so long is a peer tried that cannot be reached, or that knows of no such job yet. Who asks
for another one when this one has failed, of another peer or of another scheduler, decides that itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from hypha.backoff import Backoff
from hypha.errors import NetworkError, Refused

#: Nothing moved for this long: the place is lent.
STILL_S = 2.0
#: So many places are lent at most.
MAX_LENT = 14
_LOOK_S = 0.5
#: Attempts without progress before a transfer fails.
MAX_ATTEMPTS = 3
#: A peer that is busy is asked again for so long, and after pauses no longer than that.
BUSY_FOR_S = 40.0
FIRST_BUSY_PAUSE_S, LONGEST_BUSY_PAUSE_S = 0.2, 1.0
#: How long a receiver is asked again that knows of no such job.
NOT_FOUND_FOR_S = 10.0
#: After an attempt that broke.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.4, 15.0


@dataclass(eq=False)
class _Held:
    moved: Callable[[], object]
    seen: object = None
    since: float = 0.0


class TransferSlots:
    """``count`` places, first come, first served; ``run`` must be running for any to be lent."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._limiter = trio.CapacityLimiter(count)
        self._held: dict[_Held, None] = {}
        self._taken = trio.Event()

    @property
    def held(self) -> int:
        """Places that are taken."""
        return self._limiter.borrowed_tokens

    @asynccontextmanager
    async def hold(self, moved: Callable[[], object]) -> AsyncIterator[None]:
        """Wait for a place, and have it. What ``moved`` returns changes while something moves."""
        held = _Held(moved)
        await self._limiter.acquire_on_behalf_of(held)
        held.seen, held.since = moved(), trio.current_time()
        self._held[held] = None
        self._taken.set()
        try:
            yield
        finally:
            self._held.pop(held, None)
            self._limiter.release_on_behalf_of(held)

    async def run(self) -> None:
        while True:
            await self._taken.wait()
            await trio.sleep(_LOOK_S)
            now = trio.current_time()
            for held in self._held:
                seen = held.moved()
                if seen != held.seen:
                    held.seen, held.since = seen, now
            still = sum(now - held.since >= STILL_S for held in self._held)
            self._limiter.total_tokens = self._count + min(still, MAX_LENT)
            if not self._held:
                self._taken = trio.Event()


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
