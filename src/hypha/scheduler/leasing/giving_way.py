"""When a job that cannot begin gives its workers back: :class:`GivingWay`, a part of its allocator. Pure.

Two jobs of which each holds half of the workers would wait for each other for ever. So one that has too few
to begin, gets no more, and holds what others ask for gives all of it back after a while, and asks for nothing
for long enough that the others get it: soon where one of them has asked for longer, so that the oldest job
begins first, and much later where all have asked for less long, as workers may have received them in another
order. How long that while is differs by job and by time, so that not all give way at once. Whether others ask
is what the workers report when a lease is renewed: a job that is alone waits for as long as it takes.

A job can also be in its own way: where it lacks a parameter server and trains on more workers than it needs
to begin, one of those goes back. One that trains never gives way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from hashlib import blake2b

from hypha.backoff import pause_after
from hypha.scheduler.leasing.events import Search, SearchTimes

#: the first pause, as multiples of the longest one between two requests: the requests of the others have been
#: received by then
_FIRST_PAUSE = 2.0
#: a pause is twice as long as the one before, up to so many times the first
_LONGEST = 2.0
#: so many times as long as others wait to give way to it
_SENIOR = 10.0


class GivingWay:
    """For all searches of one job."""

    def __init__(self, asks: Iterable[Search], pace: SearchTimes) -> None:
        self._names = " ".join(ask.request_id for ask in asks)
        self._pace = pace
        #: the job trains
        self.begun = False
        self._contended: set[str] = set()
        #: those that somebody asks for who has asked for longer than this job
        self._outranked: set[str] = set()
        #: when it gives way, unless something happens before
        self.yield_at: float | None = None
        self._due = self._junior = False
        #: how often it gave way
        self.times = 0

    def contended(self, lease_id: str, contended: bool, outranked: bool = False) -> None:
        """Whether others ask for what this lease holds, and one of them has asked for longer. One that is
        over is not contended.
        """
        self._contended.discard(lease_id)
        self._outranked.discard(lease_id)
        if contended:
            self._contended.add(lease_id)
        if contended and outranked:
            self._outranked.add(lease_id)

    def pause_s(self, short: bool, surplus: bool, now: float) -> float | None:
        """Whether to give way now, and for how long; ``short``: it has too few workers to begin, ``surplus``:
        and of another kind more than it needs for that.
        """
        after_s = self._pace.yield_after_s
        self._due = after_s is not None and not self.begun and short and bool(surplus or self._contended)
        if after_s is None or not self._due:
            self.yield_at = None
            return None
        junior = surplus or bool(self._outranked)
        if self.yield_at is None or junior != self._junior:
            self._junior = junior
            self.yield_at = now + after_s * (1.0 + self._share()) * (1.0 if junior else _SENIOR)
        if now < self.yield_at:
            return None
        self.yield_at = None
        if not surplus:
            self._contended.clear()
            self._outranked.clear()
        self.times += 1
        longer = pause_after(self.times - 1, 1.0, _LONGEST)
        return _FIRST_PAUSE * self._pace.longest_pause_s * longer

    def validate(self, held: Collection[str]) -> None:
        assert self._outranked <= self._contended <= set(held), (
            f"{self._contended} are contended, and {held} are held"
        )
        assert self.yield_at is None or self._due, "nobody is there to give way to"

    def _share(self) -> float:
        """0 to 1, another one for each job and each time."""
        digest = blake2b(f"{self._names} {self.times}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") / 2.0**32
