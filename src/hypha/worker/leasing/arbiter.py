"""The worker's arbiter, a pure machine: which scheduler gets an offer of what, and at what price.

Requests received within a short window compete: those this worker can and wants to serve are ordered by bid
per weighted unit of what they ask for, and as long as something is free each gets an offer with a temporary
lease behind it, so nothing is promised twice. A bid counts for more the longer its scheduler has waited here
(:mod:`hypha.worker.leasing.ageing`), so that nobody waits for ever; a lease that runs is never taken away for
it. A request received again (schedulers repeat them) gets no second offer while there is a lease for it, and
a scheduler holds one temporary lease at most for each class of executor. Nothing is held for a scheduler that
cannot be reached: its request waits until it is. One whose offers come to nothing again and again (they
cannot be delivered, or are kept without an answer) is offered nothing for a while, which grows until it
accepts one. What a strategy offers:

- ``flexible``: exactly what was asked for. ``utilization`` and ``affinity`` offer the same, at a price that
  follows the load, or is lower for some (:mod:`hypha.worker.leasing.pricing`).
- ``whole``: to a training job everything that is free at that moment, since a larger batch is what it
  can use it for; to a parameter server, which has no use for more, exactly what was asked for. So a
  worker hosts both under two leases when the parameter server comes first, and never when it does not:
  an owner who wants both in any order takes ``flexible``.

GPU memory is given of one GPU, or of several that nobody uses (:mod:`hypha.worker.limits.devices`): what is
free on no GPU by itself is not offered.

The price offered is the worker's at that moment, or the bid where that is higher: a scheduler pays what it
bids, else outbidding others would cost nothing. An offer above the bid is a counter-offer: its scheduler
takes it where it is within its private maximum, and refuses it at once where it is not.

It is one module, as every decision reads and changes the same requests that wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from msgspec import structs

from hypha.config.offers import OfferConfig
from hypha.journal import Journal
from hypha.messages import PeerRef, WorkerOffer, WorkerRequest
from hypha.rules.leases import (
    Denied,
    Granted,
    Lease,
    LeaseBook,
    LeaseEnded,
    Renew,
    Reserve,
    Revoke,
    Tick,
)
from hypha.rules.resources import add_up, fits, weighted_capacity
from hypha.runtime import new_id
from hypha.worker.leasing.ageing import Ageing, Waiter
from hypha.worker.leasing.events import (
    ArbiterAction,
    ArbiterBegan,
    ArbiterEvent,
    Cause,
    Close,
    Ignored,
    OfferFailed,
    Reached,
    RenewAsked,
    Reopen,
    RequestReceived,
    SendOffer,
)
from hypha.worker.leasing.pricing import Pricing, load_of
from hypha.worker.leasing.vetting import FailedOffers, Vetting, WorkerCapacity
from hypha.worker.limits.devices import GpuBoard

#: of an arbiter's entries in a journal
NAME = "arbiter"
#: Requests that may wait in one window; more are not considered, so a flood cannot grow without bound.
MAX_WAITING = 1024
#: And so many of one scheduler, which publishes one for each class of executor.
MAX_WAITING_OF_ONE = 4
#: A temporary lease that is given back unused only after this share of its time came to nothing, too.
_TOO_LATE = 0.75
#: Of the time that a request allows, the share within which a better bidder's connection is waited for.
_CONNECTED_BY = 0.7


@dataclass(frozen=True)
class _Waiting:
    request: WorkerRequest
    before: float
    order: int
    reached: bool = True
    cached: bool = False

    @property
    def waiter(self) -> Waiter:
        """Who waits, to :class:`~hypha.worker.leasing.ageing.Ageing`."""
        return self.request.scheduler.peer, self.request.executor.kind


class Arbiter:
    """Decides for one worker that has ``capacity``, on the terms ``terms``. ``worker`` gives its own
    reference at the moment of an offer (addresses change), ``new_id`` lease ids. What its version can do goes
    with every offer, and nothing is offered to who needs more.
    """

    def __init__(
        self,
        capacity: WorkerCapacity,
        terms: OfferConfig,
        worker: Callable[[], PeerRef],
        new_id: Callable[[], str] = lambda: new_id(),
        journal: Journal | None = None,
    ) -> None:
        self._journal = journal
        if journal is not None:
            began = ArbiterBegan(
                capacity.total,
                tuple(capacity.executors),
                terms.model_dump(mode="json"),
                capacity.abilities,
                tuple(capacity.gpus),
            )
            journal.note(NAME, 0.0, began, (), {})
        self.book = LeaseBook(capacity.total, journal)
        #: which lease has which of them
        self.gpus = GpuBoard(capacity.gpus)
        self._terms = terms
        self.pricing = Pricing(terms)
        self._vetting = Vetting(capacity, terms, self.pricing)
        self._ageing = Ageing(terms, self.book)
        self._abilities = capacity.abilities
        self._worker = worker
        self._new_id = new_id
        self._waiting: dict[tuple[str, str], _Waiting] = {}
        #: those whose window is over, and whose scheduler is not reached yet
        self._unreached: dict[tuple[str, str], _Waiting] = {}
        self._failures = FailedOffers()
        self._received = 0
        self._window_ends: float | None = None
        #: the window is over, and a connection is waited for
        self._over = False
        self._closed = False
        #: ids of leases, and the reference that the worker gave of itself, while the present event was
        #: handled
        self._drawn: list[tuple[str, PeerRef]] = []

    @property
    def is_closed(self) -> bool:
        """It makes no offers any more."""
        return self._closed

    @property
    def next_wake(self) -> float | None:
        """When the next :class:`Tick` is due: the window's end, an expiry or another price; None when nothing
        is.
        """
        due = (self._window_ends, self.book.next_wake, self.pricing.next_wake)
        moments = [moment for moment in due if moment is not None]
        moments.extend(waiting.before for waiting in self._unreached.values())
        return min(moments, default=None)

    def handle(self, event: ArbiterEvent, now: float) -> list[ArbiterAction]:
        """Apply ``event`` at ``now``."""
        self._drawn.clear()
        actions = self._apply(event, now)
        # what is only held with an offer is no load yet
        used = add_up(lease.resources for lease in (*self.book, *self.book.draining) if lease.accepted)
        self.pricing.follow(load_of(used, self.book.total), now)
        if self._journal is not None:
            self._journal.note(NAME, now, event, actions, self._summary(), self._drawn)
            if self._journal.checked:
                self.validate(now)
        return actions

    def validate(self, now: float) -> None:
        """Assert what always holds after an event at ``now``. For tests and simulation."""
        assert (self._window_ends is None) == (not self._waiting), "requests wait without a window"
        assert self._window_ends is None or self._window_ends > now, "a window has ended undecided"
        assert not (self._closed and self._waiting), "a worker that stops lets requests wait"
        waiting_in_all = {**self._waiting, **self._unreached}
        assert len(waiting_in_all) <= MAX_WAITING, f"{len(waiting_in_all)} requests wait"
        assert all(one.before > now and not one.reached for one in self._unreached.values()), "one waits idly"
        open_ = [(lease.scheduler, lease.kind) for lease in self.book if not lease.accepted]
        assert len(open_) == len(set(open_)), "a scheduler holds two temporary leases for one class"
        for key, waiting in waiting_in_all.items():
            request = waiting.request
            assert key == (request.scheduler.peer, request.request_id), f"{request.request_id} is at {key}"
            assert self.book.live_for(*key) is None, f"{request.request_id} waits and has a lease"
        held = [(lease.scheduler, lease.request_id) for lease in self.book]
        assert len(held) == len(set(held)), "a request has two leases"
        for lease in self.book:
            assert lease.price >= self._terms.floor, f"{lease.lease_id} is below the owner's floor"
        self.pricing.validate()
        self._ageing.validate(now)

    def contention(self, lease: Lease, now: float) -> tuple[bool, bool]:
        """Whether another scheduler was refused for lack of what is leased, and still asks; and whether one
        of them has asked for longer than that of ``lease``.
        """
        return self._ageing.contention((lease.scheduler, lease.request_id), now)

    def _summary(self) -> dict[str, object]:
        """Of its state, for the journal."""
        return {
            "waiting": len(self._waiting),
            "leases": len(self.book),
            "closed": self._closed,
            "price_level": self.pricing.level,
        }

    def _apply(self, event: ArbiterEvent, now: float) -> list[ArbiterAction]:
        actions: list[ArbiterAction] = []
        match event:
            case RequestReceived(publisher, request, reached, cached):
                actions.extend(self.book.handle(Tick(), now))
                self._notice(actions, now)
                refusal = (
                    self._closed_now()
                    or self._vetting.unfit(publisher, request)
                    or self._vetting.too_low(request, cached)
                    or self._enter(request, reached, cached, now)
                )
                if refusal is not None:
                    actions.append(Ignored(request.request_id, publisher, *refusal))
            case Reached(scheduler, reached):
                actions.extend(self._reached(scheduler, reached, now))
            case OfferFailed(lease_id, _, undelivered):
                lease = self.book.get(lease_id)
                revoked = self.book.handle(Revoke(lease_id), now)
                # who was not reached has not refused anything, and goes on waiting
                self._notice(revoked, now, refused=not undelivered)
                if undelivered and lease is not None and not lease.accepted:
                    self._failures.count(lease.scheduler, now)
                actions.extend(revoked)
            case RenewAsked(lease_id, caller):
                renewed = self.book.handle(Renew(lease_id, caller, self._terms.lease_s), now)
                for one in renewed:
                    if isinstance(one, Granted) and one.lease.lease_id == lease_id:
                        self._failures.forget(caller)
                        self._ageing.over((caller, one.lease.kind))
                self._notice(renewed, now)
                actions.extend(renewed)
            case Close():
                self._closed = True
                self._waiting.clear()
                self._unreached.clear()
                self._window_ends, self._over = None, False
                actions.extend(self.book.handle(Tick(), now))
            case Reopen():
                self._closed = False
                actions.extend(self.book.handle(Tick(), now))
            case _:
                ended = self.book.handle(event, now)
                self._notice(ended, now)
                actions.extend(ended)
        if self._window_ends is not None and now >= self._window_ends:
            wait_until = self._better_ones_by(now)
            if wait_until is not None and now < wait_until:
                self._window_ends = wait_until
                self._over = True
            else:
                actions.extend(self._decide(now))
        for key in [key for key, waiting in self._unreached.items() if waiting.before <= now]:
            del self._unreached[key]
            actions.append(Ignored(key[1], key[0], "its scheduler could not be reached in time"))
        return actions

    def _rank(self, waiting: _Waiting, now: float) -> tuple[float, int]:
        """Best first: what its bid is worth to the owner, grown with its age, per weighted unit asked for; a
        request for nothing comes last.
        """
        request = waiting.request
        weight = weighted_capacity(request.resources)
        if not weight > 0:
            return 0.0, waiting.order
        worth = self.pricing.worth(request.bid, request.scheduler.peer, waiting.cached)
        return -(worth * self._ageing.factor(waiting.waiter, now) / weight), waiting.order

    def _better_ones_by(self, now: float) -> float | None:
        """Until when the decision may wait for a connection to who bids more than all that are reached, so
        that it does not lose for being connected a moment later; None where there is nothing to wait for.
        """
        reached = [waiting for waiting in self._waiting.values() if waiting.reached]
        best = min((self._rank(waiting, now) for waiting in reached), default=None)
        if best is None or all(one.reached or self._rank(one, now) > best for one in self._waiting.values()):
            return None
        return min(one.before - (1.0 - _CONNECTED_BY) * one.request.offer_within_s for one in reached)

    def _notice(self, actions: Sequence[object], now: float, refused: bool = True) -> None:
        """Temporary leases among what has ended that nobody took, and nobody gave back in time. Unless it was
        not ``refused``, its scheduler begins to wait anew.
        """
        for action in actions:
            if isinstance(action, LeaseEnded):
                self._ageing.seen((action.lease.scheduler, action.lease.request_id), now)
            if isinstance(action, LeaseEnded) and not action.lease.accepted:
                if refused:
                    self._ageing.over((action.lease.scheduler, action.lease.kind))
                left_s = action.lease.expires_at - now
                if left_s <= (1.0 - _TOO_LATE) * self._terms.temporary_lease_s:
                    self._failures.count(action.lease.scheduler, now)

    def _reached(self, scheduler: str, reached: bool, now: float) -> list[ArbiterAction]:
        """Its requests that wait for that are offered something now, or given up."""
        actions: list[ArbiterAction] = []
        late = [self._unreached.pop(key) for key in list(self._unreached) if key[0] == scheduler]
        for key in [key for key in self._waiting if key[0] == scheduler]:
            if reached:
                self._waiting[key] = replace(self._waiting[key], reached=True)
            elif not self._waiting[key].reached:
                late.append(self._waiting.pop(key))
        if not self._waiting:
            self._window_ends, self._over = None, False
        elif self._over and self._better_ones_by(now) is None:
            self._window_ends = now
        if not reached:
            self._failures.count(scheduler, now)
        for waiting in sorted(late, key=lambda one: self._rank(one, now)):
            if reached:
                actions.extend(self._offer(waiting, now))
            else:
                reason = "its scheduler cannot be reached"
                actions.append(Ignored(waiting.request.request_id, scheduler, reason))
        return actions

    def _closed_now(self) -> tuple[str, Cause] | None:
        return ("this worker is drained, or stopping", "closed") if self._closed else None

    def _has_an_offer(self, request: WorkerRequest) -> bool:
        """A temporary lease for its scheduler and class of executor is there."""
        asks = (request.scheduler.peer, request.executor.kind)
        return any((lease.scheduler, lease.kind) == asks and not lease.accepted for lease in self.book)

    def _enter(
        self, request: WorkerRequest, reached: bool, cached: bool, now: float
    ) -> tuple[str, Cause] | None:
        """Put ``request`` into the window, or return why not."""
        key = (request.scheduler.peer, request.request_id)
        if self.book.live_for(*key) is not None:
            return "there is a lease for it", "duplicate"
        if self._has_an_offer(request):
            return "its scheduler has not answered another offer yet", "duplicate"
        if (pausing := self._failures.pausing(request.scheduler.peer, now)) is not None:
            return pausing, "other"
        known = self._waiting.get(key)
        self._unreached.pop(key, None)
        if known is None and len(self._waiting) + len(self._unreached) >= MAX_WAITING:
            return "too many requests are waiting", "other"
        of_it = sum(one[0] == key[0] for one in (*self._waiting, *self._unreached))
        if known is None and of_it >= MAX_WAITING_OF_ONE:
            return "its scheduler asks under too many names", "other"
        self._received += 1
        order = self._received if known is None else known.order
        waiting = _Waiting(request, now + request.offer_within_s, order, reached, cached)
        self._waiting[key] = waiting
        self._ageing.received(waiting.waiter, request.request_id, request.resources, now)
        # half of the time it allows is kept for the way: a short deadline shortens the window
        ends = now + min(self._terms.request_window_s, request.offer_within_s / 2)
        self._window_ends = ends if self._window_ends is None else min(self._window_ends, ends)
        return None

    def _decide(self, now: float) -> list[ArbiterAction]:
        contenders = sorted(self._waiting.values(), key=lambda waiting: self._rank(waiting, now))
        self._waiting.clear()
        self._window_ends, self._over = None, False
        actions: list[ArbiterAction] = []
        for contender in contenders:
            if contender.reached:
                actions.extend(self._offer(contender, now))
            else:
                self._unreached[contender.request.scheduler.peer, contender.request.request_id] = contender
        return actions

    def _offer(self, contender: _Waiting, now: float) -> list[ArbiterAction]:
        request = contender.request
        scheduler = request.scheduler
        if now >= contender.before:
            return [Ignored(request.request_id, scheduler.peer, "an offer would come too late")]
        if self._has_an_offer(request):
            reason = "its scheduler has not answered another offer yet"
            return [Ignored(request.request_id, scheduler.peer, reason, "duplicate")]
        if (low := self._vetting.too_low(request, contender.cached)) is not None:
            return [Ignored(request.request_id, scheduler.peer, *low)]
        free = self.book.free
        self.gpus.keep_only(lease.lease_id for lease in (*self.book, *self.book.draining))
        kept = self._ageing.kept_for(now)
        kept = None if kept is None or kept[0] == contender.waiter else kept
        taken = request.resources if kept is None else add_up([request.resources, kept[1]])
        if not fits(taken, free):
            reason = "what it asks for is not free now"
            if kept is not None and fits(request.resources, free):
                reason = "what is free is kept for a request that has waited for longer"
            self._ageing.blocked(contender.waiter)
            return [Ignored(request.request_id, scheduler.peer, reason, "resources")]
        if not self.gpus.fits(request.resources.gpu):
            reason = "no GPU has as much memory free as it asks for"
            self._ageing.blocked(contender.waiter)
            return [Ignored(request.request_id, scheduler.peer, reason, "resources")]
        free = structs.replace(free, gpu=self.gpus.largest(free.gpu))
        whole = self._terms.strategy == "whole" and request.executor.kind == "train" and kept is None
        lease_id, worker = self._new_id(), self._worker()
        self._drawn.append((lease_id, worker))
        lease = Lease(
            lease_id=lease_id,
            request_id=request.request_id,
            scheduler=scheduler.peer,
            executor=request.executor,
            resources=free if whole else request.resources,
            price=max(self.pricing.asked_of(scheduler.peer, contender.cached), request.bid),
            expires_at=now,
        )
        temporary_s = self._terms.temporary_lease_s
        actions: list[ArbiterAction] = []
        for answer in self.book.handle(Reserve(lease, temporary_s), now):
            if isinstance(answer, Granted):
                self.gpus.place(lease.lease_id, lease.resources.gpu)
                offer = WorkerOffer(
                    lease_id=lease.lease_id,
                    request_id=request.request_id,
                    worker=worker,
                    resources=lease.resources,
                    price=lease.price,
                    expires_in_s=temporary_s,
                    version=self._abilities.version,
                    features=self._abilities.features,
                )
                self._ageing.offered(contender.waiter)
                # an offer whose lease has ended by then is no offer
                actions.append(SendOffer(scheduler, offer, min(contender.before, now + temporary_s)))
            elif isinstance(answer, Denied):
                actions.append(Ignored(request.request_id, scheduler.peer, answer.reason, "resources"))
            else:
                actions.append(answer)
        return actions
