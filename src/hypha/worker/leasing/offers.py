"""A worker's part in the market: requests are received, offers delivered, renewals and releases answered."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from hypha.errors import NetworkError, PeerUnreachable, Refused
from hypha.messages import Acknowledged, LeaseRenewed, PeerRef, ReleaseLease, RenewLease
from hypha.node import Node
from hypha.rules.leases import Release
from hypha.telemetry.instruments import WORKER_OFFERS
from hypha.tracing import failed, span
from hypha.tracing.operations import SEND_OFFER
from hypha.worker.leasing.events import Ignored, OfferFailed, Reached, RenewAsked, SendOffer
from hypha.worker.leasing.service import LeaseService

logger = logging.getLogger(__name__)

#: A scheduler that is busy is asked again after this long, while there is time.
BUSY_PAUSE_S = 0.05
#: A scheduler that publishes a request is to be reached within this, or it gets no offer.
REACH_S = 10.0


async def serve_offers(
    node: Node,
    lease_service: LeaseService,
    unfit: Callable[[], str | None] = lambda: None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Take part in the market through ``node`` until cancelled; ``started`` once requests are received.

    While ``unfit`` has a reason, nothing is offered.
    """

    async def renew(caller: str, request: RenewLease) -> LeaseRenewed:
        lease = lease_service.granted(RenewAsked(request.lease_id, caller))
        logger.debug("Lease renewed successfully", extra={"lease_id": lease.lease_id, "peer_id": caller})
        now = trio.current_time()
        contended, outranked = lease_service.arbiter.ageing.contention(lease, now)
        return LeaseRenewed(
            lease_id=lease.lease_id,
            expires_in_s=max(0.0, lease.expires_at - now),
            contended=contended,
            outranked=outranked,
        )

    async def release(caller: str, request: ReleaseLease) -> Acknowledged:
        # a courtesy that comes twice or late has its effect already
        lease_service.handle(Release(request.lease_id, caller))
        return Acknowledged()

    node.prefer(lambda peer: any(lease.scheduler == peer for lease in lease_service.leases))
    node.answer(RenewLease, renew)
    node.answer(ReleaseLease, release)
    greeting: set[str] = set()

    async def greet(scheduler: PeerRef) -> None:
        # connecting takes as long as the window of requests, so it need not come after it
        reached = False
        try:
            with trio.move_on_after(REACH_S):
                await node.connect(scheduler)
                reached = True
        except NetworkError as exc:
            logger.debug("A scheduler cannot be reached yet: %s", exc, extra={"peer_id": scheduler.peer})
        finally:
            greeting.discard(scheduler.peer)
        lease_service.handle(Reached(scheduler.peer, reached))

    async def end_those_of_the_revoked() -> None:
        async with node.watch_peers() as losses:
            async for lost in losses:
                if not lost.revoked:
                    continue
                for lease in lease_service.leases:
                    if lease.scheduler == lost.peer:
                        lease_service.handle(Release(lease.lease_id, lost.peer))

    async with node.subscribe() as requests, trio.open_nursery() as nursery:
        nursery.start_soon(end_those_of_the_revoked)
        nursery.start_soon(
            lease_service.run, lambda action: nursery.start_soon(_deliver, node, lease_service, action)
        )
        task_status.started()
        warned = False
        async for received in requests:
            publisher, request = received.publisher, received.request
            if (reason := unfit()) is not None:
                if not warned:
                    logger.error("Nothing is offered: %s.", reason)
                warned = True
                WORKER_OFFERS.add(outcome="disk")
                continue
            if warned:
                logger.info("There is space again; offers are made.")
                warned = False
            reached = node.is_connected(publisher)
            try:
                actions = lease_service.receive(publisher, request, received.traceparent, reached)
            except Exception:  # the edge of a service loop: anybody with a certificate may publish
                logger.exception(
                    "A request for workers could not be considered.", extra={"peer_id": publisher}
                )
                continue
            ignored = any(
                isinstance(action, Ignored) and action.request_id == request.request_id for action in actions
            )
            if not (ignored or publisher in greeting or reached):
                greeting.add(publisher)
                nursery.start_soon(greet, request.scheduler)


async def _deliver(node: Node, lease_service: LeaseService, action: SendOffer) -> None:
    """Bring one offer to its scheduler, or have its lease taken back at once."""
    offer, peer = action.offer, action.scheduler.peer
    fields = {"lease_id": offer.lease_id, "request_id": offer.request_id, "peer_id": peer}
    lease_ends = trio.current_time() + offer.expires_in_s
    node.learn(action.scheduler)
    reason, undelivered = "there was no time left to send it", False
    attributes = {"hypha.peer": peer, "hypha.lease": offer.lease_id}
    with span(SEND_OFFER, attributes, parent=lease_service.evaluated_in(offer.lease_id)) as sending:
        while (now := trio.current_time()) < action.before:
            try:
                await _check_role(node, peer, action.before - now)
                # sent in time; for the answer there is as long as the lease behind the offer lasts
                await node.request(peer, offer, timeout_s=lease_ends - trio.current_time())
            except Refused as exc:
                reason = str(exc)
                # an offer lasts for a moment: only a place at the scheduler comes within it
                if exc.code == "busy":
                    await trio.sleep(BUSY_PAUSE_S)
                    continue
                break
            except NetworkError as exc:
                reason, undelivered = str(exc), True
                break
            logger.debug("An offer was delivered.", extra=fields)
            return
        logger.info("An offer was not taken: %s.", reason, extra=fields)
        lease_service.handle(OfferFailed(offer.lease_id, reason, undelivered))
        failed(sending, reason)


async def _check_role(node: Node, peer: str, timeout_s: float) -> None:
    """Raise Refused unless the certificate of ``peer`` allows it to be a scheduler. May connect."""
    try:
        roles = node.roles_of(peer)
    except PeerUnreachable:
        with trio.move_on_after(timeout_s):
            await node.connect(peer)
        roles = node.roles_of(peer)
    if roles and "scheduler" not in roles:
        raise Refused("role", f"{peer} asks for workers, but its certificate does not make it a scheduler")
