"""One lease from its acceptance to its end: :func:`keep_renewed`, which the pool runs in a task of its own.

A slow worker delays only its own renewals. What becomes of the lease is reported as plain values, which the
pool carries out.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import trio
from opentelemetry.trace import Span, Status, StatusCode, use_span

from hypha.errors import NetworkError, PeerUnreachable, Refused
from hypha.messages import LeaseRenewed, RenewLease
from hypha.node import Node
from hypha.rules.leases import Tick
from hypha.scheduler.leasing.events import Contended, Gained, LeaseGained
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
#: How long a lease that an earlier scheduler gained counts as held until its worker confirms it. It may last
#: longer, but the job is not held up for a worker that may be gone.
ADOPT_S = 10.0

#: What is reported while a lease is kept; after :class:`Lapsed` nothing more.
Reported = Gained | Contended | Suspected | Recovered | Lapsed


@dataclass(eq=False)
class Holding:
    """A lease that is being accepted, or held. Whoever changes it sets ``nudge``."""

    #: as it is dispatched under, and kept in the ledger
    lease: LeaseGained
    renewal: Renewal
    gained: bool = False
    connection_lost: bool = False
    revoked: bool = False
    #: when its worker ends, where the worker has announced it; and why it has ended the lease itself
    leaves_at: float = math.inf
    handed_back: str | None = None
    #: when that was passed on last
    leaving_passed_on_at: float = -math.inf
    #: others ask its worker for what it holds; one of them has asked for longer
    contention: tuple[bool, bool] = (False, False)
    nudge: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    #: the ``traceparent`` of the span in which its offer was received
    offered_in: str | None = None

    @property
    def overstays_at(self) -> float:
        """When its worker, if it has announced its end, should have ended for a while."""
        return self.leaves_at + OVERSTAY_S

    @property
    def log_fields(self) -> dict[str, str]:
        return {"lease_id": self.lease.lease_id, "worker_peer_id": self.lease.worker.peer}

    @property
    def attributes(self) -> dict[str, str]:
        return {"hypha.lease": self.lease.lease_id, "hypha.peer": self.lease.worker.peer}


async def keep_renewed(held: Holding, node: Node, report: Callable[[Holding, Reported], None]) -> None:
    """Accept the lease by its first renewal, and renew it as its machine decides, until it lapses or its
    scope is cancelled. ``report`` receives what becomes of it. A span covers all attempts of one renewal; the
    first one accepts the offer, and belongs to the span in which that was received.
    """
    renewal = held.renewal
    span: Span | None = None
    operation, parent = RENEW_LEASE if held.gained else ACCEPT_OFFER, held.offered_in
    events: list[RenewalEvent] = [Tick()]
    with held.scope, contextlib.ExitStack() as spans:
        while True:
            attempt: Attempt | None = None
            for event in events:
                for action in renewal.handle(event, trio.current_time()):
                    if isinstance(action, Attempt):
                        attempt = action
                        continue
                    if span is not None and isinstance(action, Suspected | Lapsed):
                        what = "lease lost" if isinstance(action, Lapsed) else "lease suspect"
                        span.add_event(what, {"hypha.reason": action.reason})
                        failed(span, action.reason)
                    report(held, action)
                    if isinstance(action, Lapsed):
                        return
            if attempt is not None:
                if span is None:
                    span = start_span(operation, held.attributes, parent=parent)
                    spans.callback(span.end)
                with use_span(span, record_exception=False, set_status_on_exception=False):
                    result = await _attempt(held, node, attempt.timeout_s, report)
                if isinstance(result, Renewed):
                    if not held.gained:
                        held.gained = True
                        report(held, Gained(held.lease.lease_id))
                    span.set_status(Status(StatusCode.OK))
                    spans.close()
                    span, operation, parent = None, RENEW_LEASE, None
                events = [result]
            else:
                with trio.move_on_at(min(renewal.next_wake, held.overstays_at)):
                    await held.nudge.wait()
                held.nudge = trio.Event()
                events = [Tick()]
            if trio.current_time() >= held.overstays_at and held.handed_back is None:
                held.handed_back = "it was to have ended by now"
            if held.revoked:
                events = [CertificateRevoked()]
            elif held.handed_back is not None:
                events = [RenewalRefused("lease", f"its worker hands it back: {held.handed_back}")]
            elif held.connection_lost:
                held.connection_lost = False
                # after a success the lessor may have died; before a failure it explains that one
                events.insert(isinstance(events[0], Renewed), ConnectionLost())


async def _attempt(
    held: Holding, node: Node, timeout_s: float, report: Callable[[Holding, Reported], None]
) -> RenewalEvent:
    lease_id, peer = held.lease.lease_id, held.lease.worker.peer
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
        report(held, Contended(lease_id, *contention))
    return Renewed(reply.expires_in_s)
