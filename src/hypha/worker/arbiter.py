"""The worker's arbiter, a pure machine: which scheduler gets an offer of what, and at what price.

Requests heard within a short window compete: those this worker can and wants to serve are ordered by
bid per weighted unit of what they ask for, and as long as something is free each gets an offer with a
temporary lease behind it, so nothing is promised twice. A request heard again (schedulers repeat them)
gets no second offer while a lease for it lives. What a strategy offers:

- ``flexible``: exactly what was asked for.
- ``whole``: to a training job everything that is free at that moment, since a larger batch is what it
  can use it for; to a parameter server, which has no use for more, exactly what was asked for. So a
  worker hosts both under two leases when the parameter server comes first, and never when it does not:
  an owner who wants both in any order takes ``flexible``.

The price offered is the owner's, or the bid where that is higher: a scheduler pays what it bids, else
outbidding others would cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from msgspec import Struct

from hypha.config.models import OfferConfig
from hypha.features import OURS, Abilities, printable
from hypha.journal import Journal
from hypha.leases import (
    Bind,
    Denied,
    Drained,
    Ended,
    Freed,
    Granted,
    Hold,
    Lease,
    LeaseBook,
    Release,
    Renew,
    Reserve,
    Revoke,
    Tick,
)
from hypha.messages import ExecutorDescriptor, PeerRef, Resources, WorkerOffer, WorkerRequest
from hypha.resources import fits, is_valid, weighted_capacity
from hypha.runtime import new_id

#: of an arbiter's entries in a journal
NAME = "arbiter"
#: Requests that may wait in one window; more are not considered, so a flood cannot grow without bound.
MAX_WAITING = 1024


# --- in -----------------------------------------------------------------------------------------------


class Heard(Struct, frozen=True, tag=True):
    """``request`` was published by the authenticated ``publisher``."""

    publisher: str
    request: WorkerRequest


class OfferFailed(Struct, frozen=True, tag=True):
    """The offer was refused or could not be delivered in time."""

    lease_id: str
    reason: str


class RenewAsked(Struct, frozen=True, tag=True):
    """The authenticated ``caller`` renews, or by its first renewal accepts."""

    lease_id: str
    caller: str


class Close(Struct, frozen=True, tag=True):
    """Offer nothing any more; leases go on (a worker that is about to stop)."""


class ArbiterBegan(Struct, frozen=True, tag=True):
    """What an arbiter was made from: the first entry of its journal."""

    total: Resources
    executors: tuple[ExecutorDescriptor, ...]
    terms: dict[str, str | float]
    abilities: Abilities = Abilities()


ArbiterEvent = Heard | OfferFailed | RenewAsked | Release | Bind | Hold | Drained | Tick | Close


# --- out ------------------------------------------------------------------------------------------------


class SendOffer(Struct, frozen=True, tag=True):
    """Bring ``offer`` to ``scheduler`` before ``before``, or say :class:`OfferFailed`."""

    scheduler: PeerRef
    offer: WorkerOffer
    before: float


#: why a request gets no offer
Cause = Literal["price", "resources", "executor", "features", "duplicate", "closed", "other"]


class Ignored(Struct, frozen=True, tag=True):
    """No offer for this request, and why: in words, and by ``cause``."""

    request_id: str
    scheduler: str
    reason: str
    cause: Cause = "other"


ArbiterAction = SendOffer | Ignored | Granted | Denied | Ended | Freed


@dataclass(frozen=True)
class _Waiting:
    request: WorkerRequest
    before: float
    order: int

    @property
    def key(self) -> tuple[float, int]:
        """Best first: bid per weighted unit asked for; a request for nothing comes last."""
        weight = weighted_capacity(self.request.resources)
        return (-(self.request.bid / weight) if weight > 0 else 0.0, self.order)


class Arbiter:
    """Decides for one worker with ``total`` resources that runs ``executors``, on the terms ``terms``.

    ``worker`` gives its own reference at the moment of an offer (addresses change), ``new_id`` lease ids.
    ``abilities`` go with every offer, and nothing is offered to who needs others.
    """

    def __init__(
        self,
        total: Resources,
        executors: Iterable[ExecutorDescriptor],
        terms: OfferConfig,
        worker: Callable[[], PeerRef],
        new_id: Callable[[], str] = lambda: new_id(),
        journal: Journal | None = None,
        abilities: Abilities = OURS,
    ) -> None:
        executors = tuple(executors)
        self._journal = journal
        if journal is not None:
            began = ArbiterBegan(total, executors, terms.model_dump(mode="json"), abilities)
            journal.note(NAME, 0.0, began, (), {})
        self.book = LeaseBook(total, journal)
        self._executors = frozenset((executor.kind, executor.name) for executor in executors)
        self._terms = terms
        self._abilities = abilities
        self._worker = worker
        self._new_id = new_id
        self._waiting: dict[tuple[str, str], _Waiting] = {}
        self._heard = 0
        self._window_ends: float | None = None
        self._closed = False
        #: ids of leases, and what the worker said of itself, while the present event was handled
        self._drawn: list[tuple[str, PeerRef]] = []

    @property
    def next_wake(self) -> float | None:
        """When the next :class:`Tick` is due: the window's end or an expiry; None when nothing is."""
        moments = [moment for moment in (self._window_ends, self.book.next_wake) if moment is not None]
        return min(moments, default=None)

    def handle(self, event: ArbiterEvent, now: float) -> list[ArbiterAction]:
        """Apply ``event`` at ``now``."""
        self._drawn.clear()
        actions = self._apply(event, now)
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
        assert len(self._waiting) <= MAX_WAITING, f"{len(self._waiting)} requests wait"
        for key, waiting in self._waiting.items():
            request = waiting.request
            assert key == (request.scheduler.peer, request.request_id), f"{request.request_id} is at {key}"
            assert self.book.live_for(*key) is None, f"{request.request_id} waits and has a lease"
        held = [(lease.scheduler, lease.request_id) for lease in self.book]
        assert len(held) == len(set(held)), "a request has two leases"

    def _summary(self) -> dict[str, object]:
        """Of its state, for the journal."""
        return {"waiting": len(self._waiting), "leases": len(self.book), "closed": self._closed}

    def _apply(self, event: ArbiterEvent, now: float) -> list[ArbiterAction]:
        actions: list[ArbiterAction] = []
        match event:
            case Heard(publisher, request):
                actions.extend(self.book.handle(Tick(), now))
                refusal = self._unfit(publisher, request) or self._enter(request, now)
                if refusal is not None:
                    actions.append(Ignored(request.request_id, publisher, *refusal))
            case OfferFailed(lease_id, _):
                actions.extend(self.book.handle(Revoke(lease_id), now))
            case RenewAsked(lease_id, caller):
                actions.extend(self.book.handle(Renew(lease_id, caller, self._terms.lease_s), now))
            case Close():
                self._closed = True
                self._waiting.clear()
                self._window_ends = None
                actions.extend(self.book.handle(Tick(), now))
            case _:
                actions.extend(self.book.handle(event, now))
        if self._window_ends is not None and now >= self._window_ends:
            actions.extend(self._decide(now))
        return actions

    def _unfit(self, publisher: str, request: WorkerRequest) -> tuple[str, Cause] | None:
        """Why this worker will never serve ``request``, whatever is free."""
        if self._closed:
            return "this worker is stopping", "closed"
        if request.scheduler.peer != publisher:
            return "it names another scheduler than the one that published it", "other"
        if (request.executor.kind, request.executor.name) not in self._executors:
            return f"no executor {request.executor.name!r} for {request.executor.kind} jobs here", "executor"
        if lacking := self._abilities.lacks(request.needs):
            named = ", ".join(printable(name) for name in lacking)
            return (
                f"its job needs what {self._abilities} does not have ({named}); upgrade this worker",
                "features",
            )
        if not is_valid(request.resources) or request.count < 1:
            return "it asks for amounts that make no sense", "resources"
        # a comparison with NaN is always False, so each bound is stated as what must hold
        if not (math.isfinite(request.bid) and request.bid >= 0):
            return "its bid makes no sense", "price"
        if not (math.isfinite(request.offer_within_s) and request.offer_within_s > 0):
            return "it leaves no time for an offer", "other"
        if not request.bid >= self._terms.floor:
            return f"its bid is below this worker's floor of {self._terms.floor:g}", "price"
        if not fits(request.resources, self.book.total):
            return "it asks for more than this worker has", "resources"
        return None

    def _enter(self, request: WorkerRequest, now: float) -> tuple[str, Cause] | None:
        """Put ``request`` into the window, or say why not."""
        key = (request.scheduler.peer, request.request_id)
        if self.book.live_for(*key) is not None:
            return "a lease for it lives", "duplicate"
        known = self._waiting.get(key)
        if known is None and len(self._waiting) >= MAX_WAITING:
            return "too many requests are waiting", "other"
        self._heard += 1
        order = self._heard if known is None else known.order
        self._waiting[key] = _Waiting(request, now + request.offer_within_s, order)
        # half of the time it allows is kept for the way: a short deadline shortens the window
        ends = now + min(self._terms.request_window_s, request.offer_within_s / 2)
        self._window_ends = ends if self._window_ends is None else min(self._window_ends, ends)
        return None

    def _decide(self, now: float) -> list[ArbiterAction]:
        contenders = sorted(self._waiting.values(), key=lambda waiting: waiting.key)
        self._waiting.clear()
        self._window_ends = None
        actions: list[ArbiterAction] = []
        for contender in contenders:
            actions.extend(self._offer(contender, now))
        return actions

    def _offer(self, contender: _Waiting, now: float) -> list[ArbiterAction]:
        request = contender.request
        scheduler = request.scheduler
        if now >= contender.before:
            return [Ignored(request.request_id, scheduler.peer, "an offer would come too late")]
        free = self.book.free
        if not fits(request.resources, free):
            reason = "what it asks for is not free now"
            return [Ignored(request.request_id, scheduler.peer, reason, "resources")]
        whole = self._terms.strategy == "whole" and request.executor.kind == "train"
        lease_id, worker = self._new_id(), self._worker()
        self._drawn.append((lease_id, worker))
        lease = Lease(
            lease_id=lease_id,
            request_id=request.request_id,
            scheduler=scheduler.peer,
            executor=request.executor,
            resources=free if whole else request.resources,
            price=max(self._terms.price, request.bid),
            expires_at=now,
        )
        life_s = self._terms.temporary_lease_s
        actions: list[ArbiterAction] = []
        for answer in self.book.handle(Reserve(lease, life_s), now):
            if isinstance(answer, Granted):
                offer = WorkerOffer(
                    lease_id=lease.lease_id,
                    request_id=request.request_id,
                    worker=worker,
                    resources=lease.resources,
                    price=lease.price,
                    expires_in_s=life_s,
                    version=self._abilities.version,
                    features=self._abilities.features,
                )
                # an offer whose lease has ended by then is no offer
                actions.append(SendOffer(scheduler, offer, min(contender.before, now + life_s)))
            elif isinstance(answer, Denied):
                actions.append(Ignored(request.request_id, scheduler.peer, answer.reason, "resources"))
            else:
                actions.append(answer)
        return actions
