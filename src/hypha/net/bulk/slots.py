"""How many transfers run at once: few, and those in which nothing moves do not count.

Two fill a machine and leave remote calls quick. But a peer that does not answer, or a link that is slow,
fills nothing: its place is lent to the next in the queue, so that the dead do not hold up the living.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

#: Nothing moved for this long: the place is lent.
STILL_S = 2.0
#: So many places are lent at most.
MAX_LENT = 14
_LOOK_S = 0.5


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
        """Until cancelled."""
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
