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
  follows the load, or is lower for some (:mod:`hypha.worker.leasing.terms`).
- ``whole``: to a training job everything that is free at that moment, since a larger batch is what it
  can use it for; to a parameter server, which has no use for more, exactly what was asked for. So a
  worker hosts both under two leases when the parameter server comes first, and never when it does not:
  an owner who wants both in any order takes ``flexible``.

GPU memory is given of one GPU, or of several that nobody uses (:mod:`hypha.worker.limits.gpus`): what is
free on no GPU by itself is not offered.

The price offered is the worker's at that moment, or the bid where that is higher: a scheduler pays what it
bids, else outbidding others would cost nothing. An offer above the bid is a counter-offer: its scheduler
takes it where it is within its private maximum, and refuses it at once where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from msgspec import structs

from hypha.config.offers import OfferConfig
from hypha.journal import Journal
from hypha.messages import PeerRef, WorkerOffer, WorkerRequest
from hypha.rules.leases import Denied, Granted, Lease, LeaseBook, LeaseEnded, Tick
from hypha.rules.resources import add_up, fits, weighted_capacity
from hypha.runtime import new_id
from hypha.worker.leasing.ageing import Ageing, FailedOffers, Waiter
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
from hypha.worker.leasing.terms import Pricing, WorkerCapacity, load_of
from hypha.worker.limits.gpus import GpuBoard

#: of an arbiter's entries in a journal
NAME = "arbiter"
#: Requests that may wait in one window; more are not considered, so a flood cannot grow without bound.
MAX_WAITING = 1024
#: And so many of one scheduler, which publishes one for each class of executor.
MAX_WAITING_OF_ONE = 4
_CLOSED: tuple[str, Cause] = "this worker is drained, or stopping", "closed"
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
    reference at the moment of an offer (addresses change), ``new_id`` lease ids.
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
        self.book = LeaseBook(capacity.total)
        #: which lease has which of them
        self.gpus = GpuBoard(capacity.gpus)
        self._terms = terms
        self.pricing = Pricing(terms)
        self.ageing = Ageing(terms, self.book)
        self._capacity = capacity
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
        #: it makes no offers any more
        self.closed = False
        #: ids of leases, and the reference that the worker gave of itself, while the present event was
        #: handled
        self._drawn: list[tuple[str, PeerRef]] = []

    @property
    def next_wake(self) -> float | None:
        """When the next :class:`Tick` is due: a window's end, an expiry, another price; None: none is."""
        due = (self._window_ends, self.book.next_wake, self.pricing.next_wake)
        moments = [moment for moment in due if moment is not None]
        moments.extend(waiting.before for waiting in self._unreached.values())
        return min(moments, default=None)

    def handle(self, event: ArbiterEvent, now: float) -> list[ArbiterAction]:
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
        self.book.validate(now)
        assert (self._window_ends is None) == (not self._waiting), "requests wait without a window"
        assert self._window_ends is None or self._window_ends > now, "a window has ended undecided"
        assert not (self.closed and self._waiting), "a worker that stops lets requests wait"
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
        self.ageing.validate(now)

    def _summary(self) -> dict[str, object]:
        return {
            "waiting": len(self._waiting),
            "leases": len(self.book),
            "draining": len(self.book.draining),
            "closed": self.closed,
            "price_level": self.pricing.level,
        }

    def _apply(self, event: ArbiterEvent, now: float) -> list[ArbiterAction]:
        actions: list[ArbiterAction] = []
        match event:
            case RequestReceived(publisher, request, reached, cached):
                actions.extend(self.book.handle(Tick(), now))
                self._notice(actions, now)
                refusal = (
                    (_CLOSED if self.closed else None)
                    or self._capacity.unfit(publisher, request, self._terms.floor)
                    or self.pricing.too_low(request, cached)
                    or self._enter(request, reached, cached, now)
                )
                if refusal is not None:
                    actions.append(Ignored(request.request_id, publisher, *refusal))
            case Reached(scheduler, reached):
                actions.extend(self._reached(scheduler, reached, now))
            case OfferFailed(lease_id, _, undelivered):
                lease = self.book.get(lease_id)
                revoked = self.book.revoke(lease_id, now)
                # who was not reached has not refused anything, and goes on waiting
                self._notice(revoked, now, refused=not undelivered)
                if undelivered and lease is not None and not lease.accepted:
                    self._failures.count(lease.scheduler, now)
                actions.extend(revoked)
            case RenewAsked(lease_id, caller):
                renewed = self.book.renew(lease_id, caller, self._terms.lease_s, now)
                if isinstance(granted := renewed[-1], Granted):
                    self._failures.forget(caller)
                    self.ageing.over((caller, granted.lease.kind))
                self._notice(renewed, now)
                actions.extend(renewed)
            case Close():
                self.closed = True
                self._waiting.clear()
                self._unreached.clear()
                self._window_ends, self._over = None, False
                actions.extend(self.book.handle(Tick(), now))
            case Reopen():
                self.closed = False
                actions.extend(self.book.handle(Tick(), now))
            case _:
                actions.extend(self.book.handle(event, now))
                self._notice(actions, now)
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
        return -(worth * self.ageing.factor(waiting.waiter, now) / weight), waiting.order

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
        for lease in [action.lease for action in actions if isinstance(action, LeaseEnded)]:
            self.ageing.seen((lease.scheduler, lease.request_id), now)
            if lease.accepted:
                continue
            if refused:
                self.ageing.over((lease.scheduler, lease.kind))
            if lease.expires_at - now <= (1.0 - _TOO_LATE) * self._terms.temporary_lease_s:
                self._failures.count(lease.scheduler, now)

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

    def _has_an_offer(self, waiter: Waiter) -> bool:
        return any((lease.scheduler, lease.kind) == waiter and not lease.accepted for lease in self.book)

    def _enter(
        self, request: WorkerRequest, reached: bool, cached: bool, now: float
    ) -> tuple[str, Cause] | None:
        """Put ``request`` into the window, or return why not."""
        key = (request.scheduler.peer, request.request_id)
        if self.book.live_for(*key) is not None:
            return "there is a lease for it", "duplicate"
        if self._has_an_offer((request.scheduler.peer, request.executor.kind)):
            return "its scheduler has not answered another offer yet", "duplicate"
        if (pausing := self._failures.pausing(request.scheduler.peer, now)) is not None:
            return pausing, "other"
        self._unreached.pop(key, None)
        if (known := self._waiting.get(key)) is None:
            others = (*self._waiting, *self._unreached)
            if len(others) >= MAX_WAITING:
                return "too many requests are waiting", "other"
            if sum(scheduler == key[0] for scheduler, _ in others) >= MAX_WAITING_OF_ONE:
                return "its scheduler asks under too many names", "other"
            self._received += 1
        order = self._received if known is None else known.order
        waiting = _Waiting(request, now + request.offer_within_s, order, reached, cached)
        self._waiting[key] = waiting
        self.ageing.received(waiting.waiter, request.request_id, request.resources, now)
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

        def ignored(reason: str, cause: Cause = "other") -> list[ArbiterAction]:
            return [Ignored(request.request_id, scheduler.peer, reason, cause)]

        if now >= contender.before:
            return ignored("an offer would come too late")
        if self._has_an_offer(contender.waiter):
            return ignored("its scheduler has not answered another offer yet", "duplicate")
        if (low := self.pricing.too_low(request, contender.cached)) is not None:
            return ignored(*low)
        free = self.book.free
        self.gpus.keep_only(lease.lease_id for lease in (*self.book, *self.book.draining))
        kept = self.ageing.kept_for(now)
        kept = None if kept is None or kept[0] == contender.waiter else kept
        taken = request.resources if kept is None else add_up([request.resources, kept[1]])
        if not fits(taken, free):
            reason = "what it asks for is not free now"
            if kept is not None and fits(request.resources, free):
                reason = "what is free is kept for a request that has waited for longer"
            self.ageing.blocked(contender.waiter)
            return ignored(reason, "resources")
        if not self.gpus.fits(request.resources.gpu):
            self.ageing.blocked(contender.waiter)
            return ignored("no GPU has as much memory free as it asks for", "resources")
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
        for answer in self.book.reserve(lease, temporary_s, now):
            if isinstance(answer, Granted):
                self.gpus.place(lease.lease_id, lease.resources.gpu)
                offer = WorkerOffer(
                    lease_id=lease.lease_id,
                    request_id=request.request_id,
                    worker=worker,
                    resources=lease.resources,
                    price=lease.price,
                    expires_in_s=temporary_s,
                    version=self._capacity.abilities.version,
                    features=self._capacity.abilities.features,
                )
                self.ageing.offered(contender.waiter)
                # an offer whose lease has ended by then is no offer
                actions.append(SendOffer(scheduler, offer, min(contender.before, now + temporary_s)))
            elif isinstance(answer, Denied):
                actions.extend(ignored(answer.reason, "resources"))
            else:
                actions.append(answer)
        return actions
