"""One lease from its acceptance to its end: :func:`keep_renewed`, which the pool runs in a task of its own.

A slow worker delays only its own renewals. What becomes of the lease is reported as plain values, which the
pool carries out.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import trio
from opentelemetry.trace import Span, Status, StatusCode, use_span

from hypha.errors import NetworkError, PeerUnreachable, Refused
from hypha.messages import ExecutorClass, LeaseRenewed, RenewLease, WorkerOffer
from hypha.node import Node
from hypha.rules.leases import Tick
from hypha.scheduler.leasing.events import Contended, Dismiss, Gained
from hypha.scheduler.leasing.leases import HeldLease, LeaseGained
from hypha.scheduler.leasing.renewal import (
    Attempt,
    CertificateRevoked,
    ConnectionLost,
    Lapsed,
    Recovered,
    Renewal,
    RenewalEvent,
    RenewalFailed,
    RenewalRefused,
    Renewed,
    Suspected,
)
from hypha.tracing import failed, start_span
from hypha.tracing.operations import ACCEPT_OFFER, RENEW_LEASE

logger = logging.getLogger(__name__)

#: A worker that has not ended so long after the end it announced has its lease released.
OVERSTAY_S = 5.0
#: A worker's announcement of its end is passed on at most this often; workers send one a second.
LEAVING_PAUSE_S = 0.2
#: How long a lease that an earlier scheduler gained counts as held until its worker confirms it. It may last
#: longer, but the job is not held up for a worker that may be gone.
ADOPT_S = 10.0

#: What becomes of a lease while it is kept; after :class:`Lapsed` nothing more.
LeaseChange = Gained | Contended | Suspected | Recovered | Dismiss | Lapsed


@dataclass(eq=False)
class Holding:
    """A lease that is being accepted, or held. Whoever changes it sets ``nudge``."""

    kind: ExecutorClass
    offer: WorkerOffer
    expires_at: float
    gained: bool = False
    suspected: bool = False
    connection_lost: bool = False
    revoked: bool = False
    #: when its worker ends, where the worker has announced it; and why it has ended the lease itself
    leaves_at: float | None = None
    handed_back: str | None = None
    #: when that was passed on last
    leaving_passed_on_at: float = -math.inf
    #: others ask its worker for what it holds; one of them has asked for longer
    contention: tuple[bool, bool] = (False, False)
    nudge: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    #: the ``traceparent`` of the span in which its offer was received
    offered_in: str | None = None

    @classmethod
    def adopted(cls, lease: LeaseGained, now: float) -> Holding:
        """A lease that an earlier scheduler of the job gained."""
        offer = WorkerOffer(
            lease_id=lease.lease_id,
            request_id="",
            worker=lease.worker,
            resources=lease.resources,
            price=lease.price,
            expires_in_s=ADOPT_S,
            version=lease.version,
        )
        return cls(lease.kind, offer, now + ADOPT_S, gained=True)

    @property
    def overstays_at(self) -> float:
        """When its worker, if it has announced its end, should have ended for a while."""
        return math.inf if self.leaves_at is None else self.leaves_at + OVERSTAY_S

    @property
    def log_fields(self) -> dict[str, str]:
        """Of its log entries."""
        return {"lease_id": self.offer.lease_id, "worker_peer_id": self.offer.worker.peer}

    @property
    def attributes(self) -> dict[str, str]:
        """Of its spans."""
        return {"hypha.lease": self.offer.lease_id, "hypha.peer": self.offer.worker.peer}

    @property
    def lease(self) -> LeaseGained:
        """As it is dispatched under, and kept in the ledger."""
        offer = self.offer
        return LeaseGained(
            offer.lease_id, offer.worker, offer.resources, offer.price, self.kind, offer.version
        )

    @property
    def held_lease(self) -> HeldLease:
        """As it stands."""
        return HeldLease(self.lease, self.expires_at, self.suspected, self.leaves_at)

    def announced_end(self, left_s: float, now: float) -> float | None:
        """Its worker has announced at ``now`` that it ends in ``left_s``. How long is left, where that is to
        be passed on; None where it was a moment ago.
        """
        # an announcement may bring the end forward, never put it off: the job must not hold a worker
        # and its replacement for ever
        self.leaves_at = min(now + left_s, math.inf if self.leaves_at is None else self.leaves_at)
        self.nudge.set()
        # events are never dropped, so a worker must not be able to make many
        if now < self.leaving_passed_on_at + LEAVING_PAUSE_S:
            return None
        self.leaving_passed_on_at = now
        return max(0.0, self.leaves_at - now)


class RenewalSpans:
    """One span at a time, with ``attributes``. The first one accepts the offer that was received in the span
    ``offered_in``, a ``traceparent``; of a lease that is ``held`` already it is a renewal like the others.
    """

    def __init__(self, attributes: Mapping[str, str], offered_in: str | None, held: bool) -> None:
        self._attributes = attributes
        self._offered_in = offered_in
        self._operation = RENEW_LEASE if held else ACCEPT_OFFER
        self._span: Span | None = None

    def __enter__(self) -> RenewalSpans:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """An attempt goes on meanwhile; it is the first of a renewal, or one more."""
        if self._span is None:
            self._span = start_span(self._operation, self._attributes, parent=self._offered_in)
        with use_span(self._span, record_exception=False, set_status_on_exception=False):
            yield

    def failed(self, what: str, reason: str) -> None:
        """What became of the lease in a renewal that did not succeed: an event, and the span is an error."""
        if self._span is not None:
            self._span.add_event(what, {"hypha.reason": reason})
            failed(self._span, reason)

    def renewed(self) -> None:
        """The renewal is over; the next one has nothing to do with the offer."""
        if self._span is not None:
            self._span.set_status(Status(StatusCode.OK))
        self._end()
        self._operation, self._offered_in = RENEW_LEASE, None

    def _end(self) -> None:
        span, self._span = self._span, None
        if span is not None:
            span.end()


async def keep_renewed(
    held: Holding, renewal: Renewal, node: Node, report: Callable[[LeaseChange], None]
) -> None:
    """Accept the lease by its first renewal, and renew it as ``renewal`` decides, until it lapses or its
    scope is cancelled. ``report`` receives what becomes of it.
    """
    with held.scope, RenewalSpans(held.attributes, held.offered_in, held.gained) as spans:
        events: list[RenewalEvent] = [Tick()]
        while True:
            attempt: Attempt | None = None
            for event in events:
                for action in renewal.handle(event, trio.current_time()):
                    match action:
                        case Attempt():
                            attempt = action
                        case Suspected(reason):
                            spans.failed("lease suspect", reason)
                            report(action)
                        case Recovered():
                            report(action)
                        case Lapsed(reason):
                            spans.failed("lease lost", reason)
                            report(action)
                            return
            held.expires_at, held.suspected = renewal.expires_at, renewal.suspected
            if attempt is not None:
                with spans.attempt():
                    result = await _attempt(held, node, attempt.timeout_s, report)
                if isinstance(result, Renewed):
                    if not held.gained:
                        held.gained = True
                        report(Gained(held.offer.lease_id))
                    spans.renewed()
                events = [result]
            else:
                with trio.move_on_at(min(renewal.next_wake, held.overstays_at)):
                    await held.nudge.wait()
                held.nudge = trio.Event()
                events = [Tick()]
            if trio.current_time() >= held.overstays_at and held.handed_back is None:
                held.handed_back = "it was to have ended by now"
                report(Dismiss(held.offer.lease_id, held.offer.worker))
            if held.revoked:
                events = [CertificateRevoked()]
            elif held.handed_back is not None:
                events = [RenewalRefused("lease", f"its worker hands it back: {held.handed_back}")]
            elif held.connection_lost:
                held.connection_lost = False
                # after a success the lessor may have died; before a failure it explains that one
                events.insert(isinstance(events[0], Renewed), ConnectionLost())


async def _attempt(
    held: Holding, node: Node, timeout_s: float, report: Callable[[LeaseChange], None]
) -> RenewalEvent:
    lease_id, peer = held.offer.lease_id, held.offer.worker.peer
    try:
        reply = await node.request(peer, RenewLease(lease_id=lease_id), timeout_s=timeout_s)
    except Refused as exc:
        return RenewalRefused(exc.code, exc.reason)
    except NetworkError as exc:
        logger.debug("A renewal failed: %s", exc, extra=held.log_fields)
        unreachable = isinstance(exc, PeerUnreachable)
        return RenewalFailed(str(exc), unreachable, isinstance(exc, PeerUnreachable) and exc.gone)
    if not isinstance(reply, LeaseRenewed) or reply.lease_id != lease_id:
        return RenewalFailed(f"the reply was {type(reply).__name__}")
    logger.info("Lease renewed successfully", extra=held.log_fields)
    if (contention := (reply.contended, reply.outranked)) != held.contention:
        held.contention = contention
        report(Contended(lease_id, *contention))
    return Renewed(reply.expires_in_s)
