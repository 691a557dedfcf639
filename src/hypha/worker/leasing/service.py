"""A worker's leases, as the rest of it sees them: the arbiter under trio's clock, its actions carried out.

Whoever must stop when a lease ends is stopped by a plain call that must not block, so however long an
executor takes to stop, other leases expire on time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection

import trio
from msgspec import structs
from opentelemetry.trace import Span, use_span

from hypha.errors import Refused
from hypha.messages import (
    ExecutorClass,
    Resources,
    WorkerOffer,
    WorkerRequest,
)
from hypha.node import Changes
from hypha.rules.leases import Bind, Denied, Drained, Freed, Granted, Hold, Lease, LeaseEnded, Tick
from hypha.telemetry.instruments import WORKER_OFFERS
from hypha.tracing import start_span, traceparent
from hypha.tracing.operations import EVALUATE
from hypha.waiting import IDLE_S, Reminder
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.events import (
    ArbiterAction,
    ArbiterEvent,
    Cause,
    Close,
    Ignored,
    Reopen,
    RequestReceived,
    SendOffer,
)
from hypha.worker.leasing.pricing import Pricing
from hypha.worker.limits.devices import GpuShare

logger = logging.getLogger(__name__)

#: So many different lacks of features are logged.
MAX_LOGGED = 64


class LeaseService:
    """The leases of one worker, under trio's monotonic clock.

    ``on_expired`` is called, once and from within the loop, with every lease that ended while it was
    accepted, whether it expired or was released; it must not block. ``datasets`` gives the names of those of
    which slices are in the cache.
    """

    def __init__(
        self,
        arbiter: Arbiter,
        on_expired: Callable[[Lease], None],
        datasets: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self._arbiter = arbiter
        self._on_expired = on_expired
        self._datasets = datasets
        self._wake = trio.Event()
        #: requests for workers since a lease was last there, and why the last one got no offer
        self._requests, self._no_offer = 0, ""
        self._outbox: list[SendOffer] = []
        #: of requests that are being weighed, by scheduler and request
        self._evaluating: dict[tuple[str, str], Span] = {}
        #: lease of an offer -> ``traceparent`` of the span in which its request was weighed
        self._evaluated_in: dict[str, str] = {}
        #: what this version lacks, as it was logged
        self._logged: set[str] = set()
        #: notes everything that happens to leases
        self.changes = Changes()

    @property
    def leases(self) -> tuple[Lease, ...]:
        """All leases, temporary ones included."""
        return tuple(self._arbiter.book)

    @property
    def free(self) -> Resources:
        """What could be offered now."""
        return self._arbiter.book.free

    @property
    def total(self) -> Resources:
        """What the worker has."""
        return self._arbiter.book.total

    def gpus_of(self, lease_id: str) -> GpuShare:
        """What this lease was given of the worker's GPUs."""
        return self._arbiter.gpus.share_of(lease_id)

    @property
    def pricing(self) -> Pricing:
        """What is asked for now, and the load that it follows."""
        return self._arbiter.pricing

    def contention(self, lease: Lease, now: float) -> tuple[bool, bool]:
        """Whether other schedulers ask for what is leased, and whether one has asked for longer."""
        return self._arbiter.contention(lease, now)

    def lease_for_dispatch(
        self, lease_id: str, caller: str, kind: ExecutorClass, job_id: str | None = None
    ) -> Lease:
        """The accepted lease under which ``caller`` may start a ``kind`` executor.

        ``job_id`` binds the lease to that job; another job is refused from then on. Raises
        ``Refused("lease", ...)``.
        """
        return self._granted(Bind(lease_id, caller, kind, job_id))

    def hold(self, lease_id: str, hold_s: float) -> Lease:
        """An executor runs under this lease: when it ends, keep its resources until :meth:`drained`,
        at most ``hold_s``. Raises ``Refused("lease", ...)``.
        """
        return self._granted(Hold(lease_id, hold_s))

    def drained(self, lease_id: str) -> None:
        """No executor runs under this lease any more, so it holds nothing beyond its end."""
        self.handle(Drained(lease_id))

    def close(self) -> None:
        """Offer nothing any more; leases go on."""
        self.handle(Close())
        for evaluating in self._evaluating.values():
            evaluating.end()
        self._evaluating.clear()

    def reopen(self) -> None:
        """Make offers again."""
        self.handle(Reopen())

    @property
    def is_closed(self) -> bool:
        """Nothing is offered any more."""
        return self._arbiter.is_closed

    @property
    def draining(self) -> bool:
        """An executor whose lease is over has not ended yet."""
        return bool(self._arbiter.book.draining)

    def receive(
        self, publisher: str, request: WorkerRequest, received_in: str | None = None, reached: bool = True
    ) -> list[ArbiterAction]:
        """A request for workers was published by the authenticated ``publisher``, and received in the span
        that ``received_in``, a ``traceparent``, names. Unless it is ``reached``, whether it can be is
        reported next. As :meth:`handle`.
        """
        self._requests += 1
        key = (publisher, request.request_id)
        if (repeated := self._evaluating.pop(key, None)) is not None:
            repeated.end()
        attributes = {
            "hypha.peer": publisher,
            "hypha.request": request.request_id,
            "hypha.executor.class": request.executor.kind,
        }
        self._evaluating[key] = start_span(EVALUATE, attributes, parent=received_in)
        logger.debug(
            "A scheduler looks for %d workers for %s jobs with %s, at %g.",
            request.count,
            request.executor.kind,
            request.resources,
            request.bid,
            extra={"request_id": request.request_id, "peer_id": publisher},
        )
        cached = request.dataset is not None and request.dataset in self._datasets()
        return self.handle(RequestReceived(publisher, request, reached, cached))

    def evaluated_in(self, lease_id: str) -> str | None:
        """The ``traceparent`` of the span that the offer of that lease came out of; returned once."""
        return self._evaluated_in.pop(lease_id, None)

    def handle(self, event: ArbiterEvent) -> list[ArbiterAction]:
        """Pass on to the arbiter, and do what follows, but for offers, which the loop delivers."""
        actions = self._arbiter.handle(event, trio.current_time())
        for action in actions:
            match action:
                case SendOffer(scheduler, offer):
                    self._outbox.append(action)
                    self._offered(scheduler.peer, offer)
                case LeaseEnded(lease, reason):
                    self._ended(lease, reason)
                case Freed(lease):
                    logger.info(
                        "The resources of an ended lease are free.", extra={"lease_id": lease.lease_id}
                    )
                case Ignored(request_id, peer, reason, cause):
                    WORKER_OFFERS.add(outcome=cause)
                    self._no_offer = reason
                    fields = {"request_id": request_id, "peer_id": peer}
                    logger.log(self._level(reason, cause), "No offer: %s.", reason, extra=fields)
                    if (evaluating := self._evaluating.pop((peer, request_id), None)) is not None:
                        evaluating.set_attributes({"hypha.outcome": cause, "hypha.reason": reason})
                        evaluating.end()
                case Granted() | Denied():
                    pass  # whoever asked replies with what is returned
        self._wake.set()
        self.changes.note()
        return actions

    async def run(self, deliver: Callable[[SendOffer], None]) -> None:
        """Let time pass for the arbiter; hand each offer to ``deliver``, which must not block."""
        # while nothing is leased that is logged, less and less often
        idle = Reminder(longest_s=IDLE_S)
        while True:
            self.handle(Tick())
            # nothing is awaited up to the wait below, so no event can slip in between
            self._wake = wake = trio.Event()
            outbox, self._outbox = self._outbox, []
            for offer in outbox:
                deliver(offer)
            self._log_idle(idle)
            next_wake = self._arbiter.next_wake
            with trio.move_on_at(min(idle.next_at, math.inf if next_wake is None else next_wake)):
                await wake.wait()

    def _log_idle(self, idle: Reminder) -> None:
        if any(lease.accepted for lease in self._arbiter.book):
            idle.reset()
            self._requests, self._no_offer = 0, ""
        elif idle.due():
            received = f"{self._requests} requests were received" if self._requests else "none was received"
            logger.info(
                "Nothing is leased: waiting for a scheduler's request that fits %s; %s%s.",
                " ".join(
                    f"{name}={amount:g}" for name, amount in structs.asdict(self.free).items() if amount
                ),
                received,
                f", and the last got no offer: {self._no_offer}" if self._no_offer else "",
            )

    def _offered(self, scheduler: str, offer: WorkerOffer) -> None:
        WORKER_OFFERS.add(outcome="offered")
        logger.debug(
            "Offering %s at %g.",
            offer.resources,
            offer.price,
            extra={"lease_id": offer.lease_id, "request_id": offer.request_id, "peer_id": scheduler},
        )
        if (evaluating := self._evaluating.pop((scheduler, offer.request_id), None)) is not None:
            evaluating.set_attributes({"hypha.outcome": "offered", "hypha.lease": offer.lease_id})
            with use_span(evaluating, end_on_exit=True):
                parent = traceparent()
            if parent is not None:
                self._evaluated_in[offer.lease_id] = parent

    def _level(self, reason: str, cause: Cause) -> int:
        """Requests are repeated; what this version lacks is logged once, and only so much of it: it is peers
        who name it.
        """
        if cause != "features" or reason in self._logged or len(self._logged) >= MAX_LOGGED:
            return logging.DEBUG
        self._logged.add(reason)
        return logging.WARNING

    def _granted(self, event: Bind | Hold) -> Lease:
        return granted(self.handle(event), event.lease_id)

    def _ended(self, lease: Lease, reason: str) -> None:
        fields = {"lease_id": lease.lease_id, "peer_id": lease.scheduler, "job_id": lease.job_id}
        if not lease.accepted:
            logger.debug("A temporary lease was not taken (%s).", reason, extra=fields)
            return
        logger.info("A lease ended: it was %s.", reason, extra=fields)
        try:
            self._on_expired(lease)
        except Exception:  # the other leases must end on time, whatever goes wrong with this one
            logger.exception("What ran under an ended lease could not be stopped.", extra=fields)


def granted(actions: list[ArbiterAction], lease_id: str) -> Lease:
    """The lease among ``actions`` that was granted. Raises Refused when it was denied."""
    for action in actions:
        if isinstance(action, Granted) and action.lease.lease_id == lease_id:
            return action.lease
        if isinstance(action, Denied) and action.lease_id == lease_id:
            raise Refused(action.code, action.reason)
    raise Refused("internal", f"nothing was decided about lease {lease_id}")
