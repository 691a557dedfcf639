"""Who has waited for a worker, and for how long: :class:`Ageing`, a part of its arbiter.

Whoever bids most goes first, and with enough of those nobody else ever would. So a request counts for more
the longer its scheduler has waited here, and for one that has waited very long what becomes free is kept.
Waiting begins with the first request that this worker could serve, and is over when an offer was accepted or
came to nothing on the scheduler's side; who has not been heard for a while waits no more. Nobody loses a
lease by it.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypha.config.models import OfferConfig
from hypha.messages import ExecutorClass, Resources

#: a scheduler that wants workers repeats its request after five seconds at the latest
FORGOTTEN_S = 30.0
#: so many wait at most; those that were heard longest ago are forgotten
_REMEMBERED = 1024

#: a scheduler, by PeerID, and the class of executor that it asks for
Waiter = tuple[str, ExecutorClass]


@dataclass
class _Waits:
    since: float
    heard_at: float
    resources: Resources
    #: when the last request was refused because what it asks for was not free
    blocked: bool = False


class Ageing:
    """Of one worker."""

    def __init__(self, terms: OfferConfig) -> None:
        self._ageing_s = terms.ageing_s
        self._keep_after_s = terms.keep_after_s
        #: those heard longest ago first
        self._waits: dict[Waiter, _Waits] = {}

    def __len__(self) -> int:
        return len(self._waits)

    def heard(self, waiter: Waiter, resources: Resources, now: float) -> None:
        """It asks for ``resources``, for the first time or again."""
        self._forget(now)
        waits = self._waits.pop(waiter, None) or _Waits(now, now, resources)
        waits.heard_at, waits.resources = now, resources
        self._waits[waiter] = waits
        while len(self._waits) > _REMEMBERED:
            del self._waits[next(iter(self._waits))]

    def blocked(self, waiter: Waiter) -> None:
        """What it asks for was not free."""
        if (waits := self._waits.get(waiter)) is not None:
            waits.blocked = True

    def offered(self, waiter: Waiter) -> None:
        """What it asks for is reserved for it, for as long as its offer lives."""
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

    def others_wait(self, scheduler: str, now: float) -> bool:
        """Whether anybody but ``scheduler`` was refused for lack of what is leased, and still asks for it."""
        self._forget(now)
        return any(waits.blocked and peer != scheduler for (peer, _), waits in self._waits.items())

    def validate(self, now: float) -> None:
        """Assert what always holds. For tests and simulation."""
        assert len(self._waits) <= _REMEMBERED, f"{len(self._waits)} are remembered"
        heard = [waits.heard_at for waits in self._waits.values()]
        assert heard == sorted(heard), "those heard longest ago do not come first"
        for waiter, waits in self._waits.items():
            assert waits.since <= waits.heard_at <= now, f"{waiter} began to wait after it was heard"

    def _forget(self, now: float) -> None:
        for waiter in list(self._waits):
            if self._waits[waiter].heard_at + FORGOTTEN_S > now:
                break
            del self._waits[waiter]
