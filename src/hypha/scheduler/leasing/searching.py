"""One search for workers, a part of the allocator: what is wanted, taken and offered, and what an offer is
worth for it. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypha.features import advice, stated
from hypha.messages import WorkerOffer
from hypha.rules.resources import fits, is_valid, weighted_capacity
from hypha.scheduler.leasing.bidding import Bidding
from hypha.scheduler.leasing.events import Cause, Search, SearchTimes


@dataclass(frozen=True)
class Candidate:
    """An offer that is considered, until ``expires_at`` at most."""

    offer: WorkerOffer
    expires_at: float


class WorkerSearch:
    """What is wanted, taken and offered for one :class:`Search`; who is :attr:`missing` is advertised for."""

    def __init__(self, ask: Search, pace: SearchTimes) -> None:
        self.ask = ask
        self._pace = pace
        self.bidding = Bidding(ask)
        self.wanted = 0
        self.pause_s = 2 * pace.offer_deadline_s
        #: lease -> worker, acceptance confirmed or not
        self.taken: dict[str, str] = {}
        self.confirmed: set[str] = set()
        #: of those in ``taken``, whose workers end soon: they count as missing already
        self.leaving: set[str] = set()
        #: worker -> its lease in ``taken``; one lease a worker
        self.workers: dict[str, str] = {}
        #: nobody is taken before then: others are given way
        self.paused_until = -math.inf
        #: worker -> its newest offer
        self.candidates: dict[str, Candidate] = {}
        self.advertised_at = -math.inf
        self.decide_at: float | None = None
        self.decide_by = math.inf
        #: whether the open collection began with an offer after the deadline
        self.late = False
        self.advertise_at: float | None = None

    @property
    def missing(self) -> int:
        """How many more workers are wanted than taken."""
        return max(0, self.wanted - len(self.taken) + len(self.leaving))

    @property
    def next_wake(self) -> float | None:
        """When something is due; None while nothing is."""
        raise_at = self.bidding.raise_at if self.missing else None
        moments = [moment for moment in (self.decide_at, self.advertise_at, raise_at) if moment is not None]
        return min(moments, default=None)

    def decide_on(self, offer: WorkerOffer, now: float) -> None:
        """Set when to decide, now that ``offer`` came."""
        if self.decide_at is None:
            # it comes after the deadline, and others with it, so waiting for long is of no use
            self.late = True
            self.decide_by = now + self._pace.offer_deadline_s
        # at least half of its time is left for the way of the acceptance
        self.decide_by = min(self.decide_by, now + offer.expires_in_s / 2)
        self.decide_at = min(self.decide_by, now + self._pace.lull_s) if self.late else self.decide_by

    def validate(self) -> list[tuple[str, str]]:
        """Assert what always holds; all leases that are taken or offered, with their workers."""
        kind, taken = self.ask.kind, {worker: lease_id for lease_id, worker in self.taken.items()}
        offered = [(one.offer.lease_id, one.offer.worker.peer) for one in self.candidates.values()]
        assert self.workers == taken, f"{kind}: {self.workers} are not {taken}"
        assert len(taken) == len(self.taken), f"{kind}: a worker is taken twice"
        assert self.confirmed <= self.taken.keys(), f"{kind}: a lease that is over was confirmed"
        assert self.leaving <= self.taken.keys(), f"{kind}: a lease that is over leaves"
        assert list(self.candidates) == [peer for _, peer in offered], f"{kind}: an offer of another worker"
        assert not self.candidates or self.decide_at is not None, f"{kind}: offers lie for ever"
        assert not self.missing or self.advertise_at is not None, f"{kind}: nobody is looked for"
        assert self.missing or self.advertise_at is None, f"{kind}: more are looked for than wanted"
        self.bidding.validate()
        return [*self.taken.items(), *offered]


def usable_capacity(offer: WorkerOffer, ask: Search) -> float:
    """What the job can use of what is offered, as one number."""
    return min(weighted_capacity(offer.resources), most_capacity(ask))


def most_capacity(ask: Search) -> float:
    """How much capacity of one worker the job can use."""
    return math.inf if ask.useful is None else ask.useful * weighted_capacity(ask.resources)


def unfit(caller: str, offer: WorkerOffer, ask: Search) -> tuple[str, Cause] | None:
    """Why ``offer`` cannot answer ``ask``, in words and by cause. The private maximum is not in it."""
    if offer.worker.peer != caller:
        return "it names another worker than the one that sent it", "other"
    if not is_valid(offer.resources) or not fits(ask.resources, offer.resources):
        return "it holds less than was asked for", "resources"
    if lacking := stated(offer).lacks(ask.needs):
        return f"the worker lacks what the job needs ({', '.join(lacking)}); {advice(lacking)}", "features"
    if not (math.isfinite(offer.price) and offer.price >= 0):
        return f"its price {offer.price} makes no sense", "price"
    if not offer.price <= ask.max_price:
        return "it is too dear", "price"
    if not (math.isfinite(offer.expires_in_s) and offer.expires_in_s > 0):
        return "it has no time left", "late"
    return None
