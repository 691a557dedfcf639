"""The scheduler's allocator, a pure machine: which offers to take so that as many workers as wanted are held.

For every executor class it is given whom to ask for (:class:`Search`) and how many (:class:`Want`). While
fewer are held it advertises, collects offers until the deadline it gave, checks each against what was asked,
ranks them by capacity for the price, takes the best and releases the others at once. What is still missing is
advertised again with growing pauses; a lost worker is replaced without pause, and one that ends soon as soon
as it announces that. A worker that failed lately is taken only when nobody else offers, for longer each time.
What an offer claims is weighed by what was seen of its worker (:mod:`hypha.scheduler.leasing.track_records`):
capacity beyond what the job can use counts for nothing, a price under half of the bid is no better than that,
and a parameter server is chosen by reliability before all else. While workers are missing the bid is raised
in steps up to the private maximum (:mod:`hypha.scheduler.leasing.bidding`), and a job that cannot begin gives
way to others (:mod:`hypha.scheduler.leasing.giving_way`). Every call costs at most O(n log n) in the number
of open offers, so ten thousand workers can be driven.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from hypha.journal import Journal
from hypha.messages import ExecutorClass, WorkerOffer
from hypha.rules.leases import Tick
from hypha.rules.resources import check
from hypha.scheduler.leasing.events import (
    Accept,
    Adopted,
    Advertise,
    AllocatorAction,
    AllocatorBegan,
    AllocatorEvent,
    Begun,
    Cause,
    Contended,
    Decline,
    Dismiss,
    Gained,
    GatewayChanged,
    GiveBack,
    Keep,
    LeaseFailed,
    Offered,
    Search,
    SearchTimes,
    Want,
    Worked,
    WorkerLeaves,
)
from hypha.scheduler.leasing.giving_way import GivingWay
from hypha.scheduler.leasing.searching import Candidate, WorkerSearch, most_capacity, unfit, usable_capacity
from hypha.scheduler.leasing.track_records import Standings, TrackRecord

#: a worker that fails again and again is avoided for so many times as long, at most
_LONGEST_AVOIDANCE = 30
#: a lower price than this share of the bid gives no advantage: a worker asks for the bid at least
_LEAST_PRICE = 0.5
#: of an allocator's entries in a journal
NAME = "allocator"


class Allocator:
    """Finds workers for ``asks``, one ask an executor class."""

    def __init__(
        self, asks: Iterable[Search], pace: SearchTimes | None = None, journal: Journal | None = None
    ) -> None:
        self._pace = pace or SearchTimes()
        self._journal = journal
        asks = tuple(asks)
        self._searches: dict[ExecutorClass, WorkerSearch] = {}
        self._by_request: dict[str, WorkerSearch] = {}
        self._avoid_until: dict[str, float] = {}
        self._standings = Standings()
        self._giving_way = GivingWay(asks, self._pace)
        #: every lease that is offered or taken -> its worker
        self._known: dict[str, str] = {}
        for ask in asks:
            check(ask.resources, f"resources asked for {ask.kind}")
            if ask.kind in self._searches or ask.request_id in self._by_request:
                raise ValueError(f"two asks for {ask.kind} executors or with id {ask.request_id}")
            self._searches[ask.kind] = self._by_request[ask.request_id] = WorkerSearch(ask, self._pace)
        if journal is not None:
            journal.note(NAME, 0.0, AllocatorBegan(asks, self._pace), (), self._summary())

    @property
    def next_wake(self) -> float | None:
        """When the next :class:`Tick` is due; None while nothing is missing."""
        moments = [search.next_wake for search in self._searches.values()]
        moments.append(self._giving_way.next_wake)
        return min((moment for moment in moments if moment is not None), default=None)

    @property
    def kinds(self) -> tuple[ExecutorClass, ...]:
        """The executor classes it can look for."""
        return tuple(self._searches)

    def missing(self, kind: ExecutorClass) -> int:
        """How many more workers of ``kind`` are wanted than taken."""
        return self._searches[kind].missing

    def bid(self, kind: ExecutorClass) -> float:
        """What is bid for a worker of ``kind`` now."""
        return self._searches[kind].bidding.bid

    def handle(self, event: AllocatorEvent, now: float) -> list[AllocatorAction]:
        """Apply ``event`` at ``now``."""
        actions = self._apply(event, now)
        if self._journal is not None:
            self._journal.note(NAME, now, event, actions, self._summary())
            if self._journal.checked:
                self.validate()
        return actions

    def validate(self) -> None:
        """Assert what always holds between two events. For tests and simulation."""
        seen: dict[str, str] = {}
        for search in self._searches.values():
            for lease_id, worker in search.validate():
                assert lease_id not in seen, f"{lease_id} is in two places"
                seen[lease_id] = worker
        held = set().union(*(search.taken for search in self._searches.values()))
        self._giving_way.validate(held)
        assert self._known == seen, f"{self._known} are not {seen}"

    def _summary(self) -> dict[str, object]:
        """Of its state, for the journal."""
        return {
            kind: {
                "wanted": search.wanted,
                "taken": len(search.taken),
                "confirmed": len(search.confirmed),
                "candidates": len(search.candidates),
                "raised": search.bidding.raised,
            }
            for kind, search in self._searches.items()
        }

    def _apply(self, event: AllocatorEvent, now: float) -> list[AllocatorAction]:
        actions: list[AllocatorAction] = []
        match event:
            case Want(kind, count):
                search = self._searches.get(kind)
                if search is None:
                    raise ValueError(f"nothing is known about whom to ask for {kind} jobs")
                if count < 0:
                    raise ValueError(f"{count} workers cannot be wanted")
                if count != search.wanted:
                    search.wanted = count
                    self._hurry(search, now)
            case Offered(caller, offer):
                actions.extend(self._consider(caller, offer, now))
            case Gained(lease_id):
                for search in self._searches.values():
                    if lease_id in search.taken:
                        search.confirmed.add(lease_id)
                        self._giving_way.gained()
                        search.pause_s = 2 * self._pace.offer_deadline_s
            case Adopted(kind, lease_id, worker):
                search = self._searches[kind]
                search.taken[lease_id] = worker
                search.workers[worker] = lease_id
                search.confirmed.add(lease_id)
                self._known[lease_id] = worker
            case LeaseFailed(lease_id, avoid):
                for search in self._searches.values():
                    if lease_id in search.taken:
                        self._lose(search, lease_id, avoid, now)
            case WorkerLeaves(lease_id):
                for search in self._searches.values():
                    if lease_id in search.taken and lease_id not in search.leaving:
                        search.leaving.add(lease_id)
                        self._hurry(search, now)
            case TrackRecord():
                self._standings.know(event, self._most_useful())
            case Worked(speeds):
                self._standings.worked(speeds)
            case Contended(lease_id, contended, outranked):
                if any(lease_id in search.taken for search in self._searches.values()):
                    self._giving_way.contended(lease_id, contended, outranked)
            case Begun():
                self._giving_way.begun()
            case GatewayChanged():
                for search in self._searches.values():
                    # a job's first request coincides with its node's reservation at the relay: all would
                    # receive it twice while they are busy with the offer
                    self._hurry(search, max(now, search.advertised_at + 2 * self._pace.offer_deadline_s))
            case Tick():
                pass
        actions.extend(self._give_way(now))
        for search in self._searches.values():
            actions.extend(self._advance(search, now))
        return actions

    def _most_useful(self) -> float:
        """The weighted capacity that a training worker can make use of, at most."""
        search = self._searches.get("train")
        return math.inf if search is None else most_capacity(search.ask)

    def _hurry(self, search: WorkerSearch, at: float) -> None:
        """Advertise at ``at`` if anything is missing then, with short pauses again."""
        search.pause_s = 2 * self._pace.offer_deadline_s
        search.advertise_at = max(at, search.paused_until) if search.missing else None

    def _give_way(self, now: float) -> list[AllocatorAction]:
        """Where that is due, give back what the job has too much of to begin with, else everything, and ask
        for no more of it for a while.
        """
        wanted = [search for search in self._searches.values() if search.wanted and search.ask.least]
        short = any(len(search.confirmed) < search.ask.least for search in wanted)
        surplus = [search for search in wanted if len(search.confirmed) > search.ask.least]
        pause_s = self._giving_way.pause_s(short, bool(surplus), now)
        if pause_s is None:
            return []
        if surplus:
            search = surplus[0]
            search.paused_until = now + pause_s
            self._hurry(search, now)
            # the newest: those before it may have loaded the model
            return [GiveBack([lease_id for lease_id in search.taken if lease_id in search.confirmed][-1])]
        actions: list[AllocatorAction] = []
        for search in self._searches.values():
            actions.extend(self._dismiss(candidate) for candidate in search.candidates.values())
            search.candidates.clear()
            search.decide_at = None
            actions.extend(GiveBack(lease_id) for lease_id in search.taken)
            search.paused_until = now + pause_s
            self._hurry(search, now)
        return actions

    def _lose(self, search: WorkerSearch, lease_id: str, avoid: bool, now: float) -> None:
        worker = search.taken.pop(lease_id)
        del search.workers[worker], self._known[lease_id]
        search.leaving.discard(lease_id)
        self._giving_way.contended(lease_id, False)
        if avoid:
            self._avoid_until = {peer: until for peer, until in self._avoid_until.items() if until > now}
            times = min(self._standings.failed(worker), _LONGEST_AVOIDANCE)
            self._avoid_until[worker] = now + times * self._pace.avoid_s
        if lease_id in search.confirmed:
            search.confirmed.remove(lease_id)
            self._hurry(search, now)
        elif search.missing:
            # offers that cannot be accepted must not make the network carry requests without end
            again_at = max(now, search.advertised_at + search.pause_s / 2)
            search.advertise_at = max(again_at, search.paused_until)

    def _consider(self, caller: str, offer: WorkerOffer, now: float) -> list[AllocatorAction]:
        search = self._by_request.get(offer.request_id)
        if search is None:
            return [Decline(offer.lease_id, "not-found", f"no request {offer.request_id} of this scheduler")]
        refusal = unfit(caller, offer, search.ask)
        if refusal is not None:
            code = "unsupported" if refusal[1] == "features" else "invalid"
            return [Decline(offer.lease_id, code, *refusal)]
        owner = self._known.get(offer.lease_id)
        if owner is not None:
            # from the same worker it is the same offer again: the answer to the first was lost
            return [
                Keep(offer.lease_id)
                if owner == caller
                else Decline(offer.lease_id, "invalid", "another worker has a lease with this id")
            ]
        if caller in search.workers:
            return [Decline(offer.lease_id, "duplicate", "this worker is already taken for that job")]
        if not search.missing or now < search.paused_until:
            reason = "no more workers are wanted for this request"
            return [Decline(offer.lease_id, "not-found", reason, "not-needed")]
        actions: list[AllocatorAction] = [Keep(offer.lease_id)]
        older = search.candidates.get(caller)
        if older is not None:
            # a worker offers again only when it gave up on its first offer
            actions.append(self._dismiss(older))
        search.candidates[caller] = Candidate(offer, now + offer.expires_in_s)
        self._known[offer.lease_id] = caller
        search.decide_on(offer, now)
        return actions

    def _dismiss(self, candidate: Candidate, cause: Cause = "other") -> Dismiss:
        del self._known[candidate.offer.lease_id]
        return Dismiss(candidate.offer.lease_id, candidate.offer.worker, cause)

    def _advance(self, search: WorkerSearch, now: float) -> list[AllocatorAction]:
        actions: list[AllocatorAction] = []
        if search.candidates and not search.missing:
            search.decide_at = now
        if search.decide_at is not None and now >= search.decide_at:
            actions.extend(self._decide(search, now))
        complete = not search.missing and len(search.confirmed) == len(search.taken)
        if search.bidding.follow(complete, bool(search.missing), now):
            # published at once, unless a request was published a moment ago
            soon = max(now, search.advertised_at + 2 * self._pace.offer_deadline_s, search.paused_until)
            search.advertise_at = soon if search.advertise_at is None else min(search.advertise_at, soon)
        if not search.missing:
            search.advertise_at = None
        elif search.advertise_at is not None and now >= search.advertise_at:
            within_s = self._pace.offer_deadline_s
            raised_bid = search.bidding.bid if search.bidding.raised else None
            actions.append(Advertise(search.ask, search.missing, within_s, raised_bid))
            # the offers for this request and those that are considered already compete
            search.late = False
            search.decide_by = min(now + within_s, math.inf if search.decide_at is None else search.decide_by)
            search.decide_at = search.decide_by
            search.advertised_at = now
            search.advertise_at = now + search.pause_s
            search.pause_s = min(self._pace.longest_pause_s, search.pause_s * 2)
        return actions

    def _decide(self, search: WorkerSearch, now: float) -> list[AllocatorAction]:
        everyone = sorted(
            search.candidates.values(), key=lambda candidate: self._rank(candidate.offer, search.ask, now)
        )
        search.candidates.clear()
        search.decide_at = None
        actions: list[AllocatorAction] = []
        for candidate in everyone:
            if search.missing and candidate.expires_at > now:
                lease_id, worker = candidate.offer.lease_id, candidate.offer.worker.peer
                search.taken[lease_id] = worker
                search.workers[worker] = lease_id
                if search.ask.kind == "train":
                    self._standings.took(worker, usable_capacity(candidate.offer, search.ask))
                actions.append(Accept(search.ask.kind, candidate.offer, candidate.expires_at))
            elif candidate.expires_at <= now:
                actions.append(self._dismiss(candidate, "late"))
            else:
                avoided = self._is_avoided(candidate.offer.worker.peer, now)
                actions.append(self._dismiss(candidate, "avoided" if avoided else "not-needed"))
        return actions

    def _is_avoided(self, worker: str, now: float) -> bool:
        return self._avoid_until.get(worker, -math.inf) > now

    def _rank(
        self, offer: WorkerOffer, ask: Search, now: float
    ) -> tuple[bool, float, float, float, float, str, str]:
        """Sorts the best first, in a total order: who failed lately comes last; of parameter servers the less
        reliable ones; then capacity for the price, weighed by what was seen of the worker, then capacity,
        then the lower price; equals by PeerID, so that a run can be repeated.
        """
        worker = offer.worker.peer
        capacity, price = usable_capacity(offer, ask), max(offer.price, _LEAST_PRICE * ask.bid)
        free_of_charge = math.inf if capacity > 0 else 0.0
        value = capacity / price if price > 0 else free_of_charge
        reliability = self._standings.reliability(worker)
        first = -reliability if ask.kind == "aggregate" else 0.0
        if ask.kind == "train":
            value *= reliability * self._standings.pace(worker)
        return (self._is_avoided(worker, now), first, -value, -capacity, offer.price, worker, offer.lease_id)
