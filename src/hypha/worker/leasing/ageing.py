"""Who has waited for a worker, and for how long: :class:`Ageing`, a part of its arbiter.

Whoever bids most goes first, and with enough of those nobody else ever would. So a request counts for more
the longer its scheduler has waited here, and for one that has waited very long what becomes free is kept.
Waiting begins with the first request that this worker could serve, and is over when an offer was accepted or
came to nothing on the scheduler's side; who has not asked for a while waits no more. Nobody loses a
lease by it.

Who is offered something again and again and takes nothing gets no offer for a while: :class:`FailedOffers`.

Beside that it is known how long ago each request was received for the first time, leases under it included:
of two jobs that are in each other's way before they begin, the one that asked later is asked to give way.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypha.backoff import pause_after
from hypha.config.offers import OfferConfig
from hypha.messages import ExecutorClass, Resources
from hypha.rules.leases import Lease, LeaseBook

#: a scheduler that wants workers repeats its request after five seconds at the latest
FORGOTTEN_S = 30.0
#: requests that were first received within so long are as old as each other; then their names decide, which
#: are random, and the same for all workers
SAME_TIME_S = 5.0
#: so many are remembered at most; those that were received longest ago are forgotten
_REMEMBERED = 1024
#: After a second offer in a row that came to nothing, its scheduler gets none for so long; each time it
#: doubles.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0

#: a scheduler, by PeerID, and the class of executor that it asks for
Waiter = tuple[str, ExecutorClass]
#: a scheduler, by PeerID, and its name for a request, which it keeps as long as it wants these workers
Asked = tuple[str, str]


@dataclass
class _Waits:
    since: float
    received_at: float
    resources: Resources
    request_id: str
    #: when the last request was refused because what it asks for was not free
    blocked: bool = False


@dataclass
class _Heard:
    first_at: float
    last_at: float


class Ageing:
    """Of one worker, whose leases are in ``book``."""

    def __init__(self, terms: OfferConfig, book: LeaseBook) -> None:
        self._ageing_s = terms.ageing_s
        self._keep_after_s = terms.keep_after_s
        self._book = book
        #: those received longest ago first
        self._waits: dict[Waiter, _Waits] = {}
        self._asked: dict[Asked, _Heard] = {}

    def received(self, waiter: Waiter, request_id: str, resources: Resources, now: float) -> None:
        """It asks for ``resources``, for the first time or again."""
        self._forget(now)
        waits = self._waits.pop(waiter, None) or _Waits(now, now, resources, request_id)
        waits.received_at, waits.resources, waits.request_id = now, resources, request_id
        self._waits[waiter] = waits
        while len(self._waits) > _REMEMBERED:
            del self._waits[next(iter(self._waits))]
        asked = (waiter[0], request_id)
        self._asked.setdefault(asked, _Heard(now, now))
        self.seen(asked, now)
        while len(self._asked) > _REMEMBERED:
            del self._asked[next(iter(self._asked))]

    def seen(self, asked: Asked, now: float) -> None:
        """A lease for that request has just ended, or it was received."""
        if (heard := self._asked.pop(asked, None)) is not None:
            heard.last_at = now
            self._asked[asked] = heard

    def blocked(self, waiter: Waiter) -> None:
        if (waits := self._waits.get(waiter)) is not None:
            waits.blocked = True

    def offered(self, waiter: Waiter) -> None:
        """What it asks for is reserved for it, for as long as its offer lasts."""
        if (waits := self._waits.get(waiter)) is not None:
            waits.blocked = False

    def over(self, waiter: Waiter) -> None:
        """It was served, or did not want what it was offered."""
        self._waits.pop(waiter, None)

    def waited_s(self, waiter: Waiter, now: float) -> float:
        """0.0 of one that is not known."""
        waits = self._waits.get(waiter)
        return 0.0 if waits is None else now - waits.since

    def factor(self, waiter: Waiter, now: float) -> float:
        """So many times as much its bid counts."""
        return 1.0 if self._ageing_s is None else 1.0 + self.waited_s(waiter, now) / self._ageing_s

    def kept_for(self, now: float) -> tuple[Waiter, Resources] | None:
        """For whom what is free is kept, and how much: who was refused for lack of it and waits longest."""
        if self._keep_after_s is None:
            return None
        self._forget(now)
        found = [
            (waits.since, waiter)
            for waiter, waits in self._waits.items()
            if waits.blocked and now - waits.since >= self._keep_after_s
        ]
        if not found:
            return None
        waiter = min(found)[1]
        return waiter, self._waits[waiter].resources

    def contention(self, lease: Lease, now: float) -> tuple[bool, bool]:
        """Whether any other scheduler was refused for lack of what is leased, and still asks for it; and
        whether one of them began to ask before that of ``lease`` did.
        """
        asked = lease.scheduler, lease.request_id
        self._forget(now)
        others = [
            (peer, waits.request_id)
            for (peer, _), waits in self._waits.items()
            if waits.blocked and peer != asked[0]
        ]
        return bool(others), any(self._is_older(other, asked) for other in others)

    def _is_older(self, one: Asked, other: Asked) -> bool:
        first, second = self._asked.get(one), self._asked.get(other)
        if first is None or second is None:
            return False
        apart_s = second.first_at - first.first_at
        # whom a worker receives first it may serve first, so each would be the older one where it is served
        return apart_s > 0 if abs(apart_s) > SAME_TIME_S else one[1] < other[1]

    def validate(self, now: float) -> None:
        """Assert what always holds. For tests and simulation."""
        assert len(self._waits) <= _REMEMBERED, f"{len(self._waits)} are remembered"
        received = [waits.received_at for waits in self._waits.values()]
        assert received == sorted(received), "those received longest ago do not come first"
        for waiter, waits in self._waits.items():
            assert waits.since <= waits.received_at <= now, f"{waiter} began to wait after it was received"
        assert len(self._asked) <= _REMEMBERED, f"{len(self._asked)} requests are remembered"
        seen = [heard.last_at for heard in self._asked.values()]
        assert seen == sorted(seen), "those seen longest ago do not come first"

    def _forget(self, now: float) -> None:
        for waiter in list(self._waits):
            if self._waits[waiter].received_at + FORGOTTEN_S > now:
                break
            del self._waits[waiter]
        for asked in list(self._asked):
            if self._asked[asked].last_at + FORGOTTEN_S > now:
                break
            if self._book.live_for(*asked) is not None:
                self.seen(asked, now)
            else:
                del self._asked[asked]


class FailedOffers:
    """Offers to each scheduler that came to nothing, one after the other."""

    def __init__(self) -> None:
        #: scheduler -> how many, and until when it gets no other
        self._of: dict[str, tuple[int, float]] = {}

    def count(self, scheduler: str, now: float) -> None:
        times = self._of.pop(scheduler, (0, 0.0))[0] + 1
        pause_s = pause_after(times - 2, FIRST_PAUSE_S, LONGEST_PAUSE_S) if times > 1 else 0.0
        self._of[scheduler] = (times, now + pause_s)
        while len(self._of) > _REMEMBERED:
            del self._of[next(iter(self._of))]

    def forget(self, scheduler: str) -> None:
        """It has accepted one."""
        self._of.pop(scheduler, None)

    def pausing(self, scheduler: str, now: float) -> str | None:
        """Why it gets no offer for now."""
        times, until = self._of.get(scheduler, (0, now))
        return f"{times} offers to its scheduler came to nothing" if now < until else None
