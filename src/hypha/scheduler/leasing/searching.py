"""One search for workers, a part of the allocator: what is wanted, taken, offered and bid, and what an offer
is worth for it. An offer is what a worker claims; what the scheduler has seen of it counts, too. Pure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from msgspec.structs import replace

from hypha.features import advice, stated
from hypha.messages import WorkerOffer
from hypha.rules.resources import fits, is_valid, weighted_capacity
from hypha.scheduler.leasing.events import Cause, Search, SearchTimes, TrackRecord

#: before anything is known of a worker, it is as good as one of which so many rounds went well, and one did
#: not
_GOOD, _BAD = 2.0, 1.0
#: a failure costs more than a round is worth
_FAILURE = 2.0
#: a measured speed counts for at most so many times what is usual for the capacity, and at least one part of
#: that
_FASTEST = 10.0
#: workers that are remembered; those that were seen longest ago are forgotten
_REMEMBERED = 10_000


@dataclass(frozen=True)
class Candidate:
    """An offer that is considered, until ``expires_at`` at most."""

    offer: WorkerOffer
    expires_at: float


class WorkerSearch:
    """What is wanted, taken and offered for one :class:`Search`; who is :attr:`missing` is advertised for.

    The bid is public, the maximum is not. While workers are missing the bid rises, by a share of what lies
    between the two each time; once all are held it is what it was. What was paid for a lease stays its price.
    Raises ValueError where the numbers of ``ask`` make no sense.
    """

    def __init__(self, ask: Search, pace: SearchTimes) -> None:
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
        self.ask = ask
        self._pace = pace
        #: how often the bid was raised, and when it is raised next, while workers are missing
        self.raised = 0
        self._raise_at: float | None = None
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
        return max(0, self.wanted - len(self.taken) + len(self.leaving))

    @property
    def next_wake(self) -> float | None:
        raise_at = self._raise_at if self.missing else None
        moments = [moment for moment in (self.decide_at, self.advertise_at, raise_at) if moment is not None]
        return min(moments, default=None)

    @property
    def bid(self) -> float:
        ask = self.ask
        risen = ask.bid + min(1.0, self.raised * ask.raise_by) * (ask.max_price - ask.bid)
        return min(ask.max_price, risen)

    def raise_bid(self, now: float) -> bool:
        """Raise it if that is due, or lower it again once all are held; whether it was raised."""
        after_s, complete = self.ask.raise_after_s, len(self.confirmed) == len(self.taken)
        if after_s is None or (complete and not self.missing):
            self.raised, self._raise_at = 0, None
            return False
        if self.bid >= self.ask.max_price:
            self._raise_at = None
            return False
        if self._raise_at is None:
            self._raise_at = now + after_s
        if not self.missing or now < self._raise_at:
            return False
        self.raised += 1
        self._raise_at = now + after_s if self.bid < self.ask.max_price else None
        return True

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
        assert self.ask.bid <= self.bid <= self.ask.max_price, f"{self.bid} is bid"
        assert self._raise_at is None or self.bid < self.ask.max_price, "the maximum is to be raised"
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


class Standings:
    """What a scheduler has seen of workers itself: rounds that hold their updates, how fast they were, how
    often they failed.
    """

    def __init__(self) -> None:
        self._seen: dict[str, TrackRecord] = {}

    def _of(self, worker: str) -> TrackRecord:
        return self._seen.get(worker) or TrackRecord(worker)

    def _note(self, record: TrackRecord) -> None:
        """It is the one that was seen last."""
        self._seen.pop(record.worker, None)
        self._seen[record.worker] = record
        while len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]

    def know(self, record: TrackRecord, most: float = math.inf) -> None:
        """What a ledger has of a worker. Of its capacity the job can use ``most``."""
        # it may be held already, under a lease of which more is known
        capacity = self._of(record.worker).capacity or min(record.capacity, most)
        self._note(replace(record, capacity=capacity))

    def took(self, worker: str, capacity: float) -> None:
        """It trains under a lease of that weighted capacity."""
        self._note(replace(self._of(worker), capacity=capacity))

    def failed(self, worker: str) -> int:
        """Once more; how often in all."""
        seen = self._of(worker)
        self._note(replace(seen, failures=seen.failures + 1))
        return seen.failures + 1

    def worked(self, speeds: Iterable[tuple[str, float]]) -> None:
        """A round was applied, with updates of these workers, at so many samples a second each."""
        for worker, samples_per_s in speeds:
            seen = self._of(worker)
            rounds = seen.rounds + 1
            mean = seen.samples_per_s + (samples_per_s - seen.samples_per_s) / min(rounds, 10)
            self._note(replace(seen, rounds=rounds, samples_per_s=mean))

    def reliability(self, worker: str) -> float:
        """The share of rounds that can be expected to go well there, over 0 and under 1."""
        seen = self._of(worker)
        return (seen.rounds + _GOOD) / (seen.rounds + _GOOD + _BAD + _FAILURE * seen.failures)

    def pace(self, worker: str) -> float:
        """How fast it was for its capacity, beside what is usual; 1.0 where that is not known."""
        seen = self._of(worker)
        if not (seen.samples_per_s > 0 and seen.capacity > 0):
            return 1.0
        usual = statistics.median(
            one.samples_per_s / one.capacity
            for one in self._seen.values()
            if one.samples_per_s > 0 and one.capacity > 0
        )
        return min(_FASTEST, max(1.0 / _FASTEST, seen.samples_per_s / seen.capacity / usual))
