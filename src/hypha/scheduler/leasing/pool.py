"""The allocator's loop: a pool of leased workers that is kept full and kept alive.

:class:`Pool` advertises while workers are missing, takes the best offers and renews every lease in a
task of its own, so a slow worker never delays another's renewal. What becomes of leases is reported through
:attr:`Pool.events`. A connection that breaks makes its leases be renewed at once: a dead worker is
suspected within moments, long before its lease ends, but it is lost only when the lease expires, the
worker itself reports that it has ended, or its machine refuses connections for a while.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable

import trio

from hypha.errors import NetworkError, Refused
from hypha.features import Abilities, printable
from hypha.journal import Journal
from hypha.messages import (
    Acknowledged,
    ExecutorClass,
    LedgerRound,
    PeerRef,
    ReleaseLease,
    WorkerLeaving,
    WorkerOffer,
)
from hypha.node import Node
from hypha.rules.leases import Tick
from hypha.runtime import chance
from hypha.scheduler.leasing import events as allocation
from hypha.scheduler.leasing.allocator import Allocator
from hypha.scheduler.leasing.events import LeaseGained, PoolEvent, Search, SearchTimes, TrackRecord
from hypha.scheduler.leasing.holding import ADOPT_S, Holding, Reported, keep_renewed
from hypha.scheduler.leasing.renewal import Lapsed, Recovered, Renewal, Suspected
from hypha.scheduler.status.round_traces import RoundTraces
from hypha.scheduler.status.versions import StatedVersions
from hypha.telemetry.instruments import WORKER_REQUESTS
from hypha.tracing import span, traceparent
from hypha.tracing.operations import ADVERTISE, RECEIVE_OFFER

logger = logging.getLogger(__name__)

#: How long a courtesy release may take; the lease expires anyway.
RELEASE_TIMEOUT_S = 2.0
#: While workers are missing, that is logged again after this long.
REMIND_S = 15.0
_GIVEN_BACK = "given back, as there are too few workers to begin, and other schedulers ask for this one"
#: A worker's announcement of its end is passed on at most this often; workers send one a second.
LEAVING_PAUSE_S = 0.2
#: Releases at once: few, since acceptances are more urgent.
MAX_RELEASES = 4


class Pool:
    """Workers for ``asks``, held through ``node``. :meth:`run` does the work; it runs until cancelled or
    until :meth:`close`, and then ends :attr:`events`. One pool a node: it answers all offers.
    """

    def __init__(
        self,
        node: Node,
        asks: Iterable[Search],
        pace: SearchTimes | None = None,
        journal: Journal | None = None,
        traces: RoundTraces | None = None,
    ) -> None:
        self._node = node
        self._journal = journal
        self._traces = traces or RoundTraces(None)
        asks = tuple(asks)
        self._allocator = Allocator(asks, pace, journal)
        self._versions = StatedVersions(asks)
        self._random = chance()
        self._held: dict[str, Holding] = {}
        self._todo: list[allocation.AllocatorAction] = []
        self._wake = trio.Event()
        self._running = trio.CancelScope()
        self._releasing = trio.CapacityLimiter(MAX_RELEASES)
        #: offers that were not taken and whose workers may not know it yet
        self._unwanted: dict[str, PeerRef] = {}
        #: lease of an offer that is considered -> ``traceparent`` of the span in which its offer was received
        self._offered_in: dict[str, str] = {}
        self._begun = False
        #: when it was last logged that workers are missing, and at which raised bid
        self._logged: dict[ExecutorClass, tuple[float, float | None]] = {}
        #: requests for them that wait for a gateway
        self._publishing: set[ExecutorClass] = set()
        #: those that nobody renews yet
        self._adopted: list[Holding] = []
        # unbounded, so that renewals never wait for whoever reads; a few events a lease
        self._send, self._receive = trio.open_memory_channel[PoolEvent](math.inf)

    @property
    def events(self) -> trio.MemoryReceiveChannel[PoolEvent]:
        """What becomes of leases, in order; for one reader."""
        return self._receive

    @property
    def leases(self) -> tuple[LeaseGained, ...]:
        """All leases held now."""
        return tuple(held.lease for held in self.held)

    @property
    def held(self) -> tuple[Holding, ...]:
        """All leases held now, as they stand."""
        return tuple(held for held in self._held.values() if held.gained)

    def missing(self, kind: ExecutorClass) -> int:
        """How many more workers of ``kind`` are wanted than taken."""
        return self._allocator.missing(kind)

    def shortage(self, kind: ExecutorClass) -> str:
        """Which workers lack a feature that ``kind`` jobs need, or may lack one; empty where none can."""
        return self._versions.shortage(kind)

    def want(self, kind: ExecutorClass, count: int) -> None:
        """Hold ``count`` workers of ``kind``. With fewer than are held nothing is released by itself."""
        self._apply(allocation.Want(kind, count))

    def bid(self, kind: ExecutorClass) -> float:
        """What is bid for a worker of ``kind`` now."""
        return self._allocator.bid(kind)

    def begin(self) -> None:
        """The job trains: what it holds is not given back any more for lack of the rest. Repeats are free."""
        if not self._begun:
            self._begun = True
            self._apply(allocation.Begun())

    def know(self, record: TrackRecord) -> None:
        """What the ledger has of a worker: it counts when offers are compared."""
        self._apply(record)

    def worked(self, entry: LedgerRound) -> None:
        """A round was applied: how fast each worker was in it is known."""
        if entry.duration_s > 0:
            parts = {part.worker: part.samples / entry.duration_s for part in entry.contributors}
            self._apply(allocation.Worked(tuple(parts.items())))

    def adopt(self, leases: Iterable[LeaseGained]) -> None:
        """Go on with leases of an earlier scheduler: they count as held, without :class:`Gained`, and are
        renewed at once; :class:`Lapsed` is reported of those that their workers do not know, or that
        nobody confirms. Before or while :meth:`run` runs.
        """
        for lease in leases:
            self._adopted.append(self._start_holding(lease, ADOPT_S, gained=True))
            self._apply(allocation.Adopted(lease.kind, lease.lease_id, lease.worker.peer))

    async def release(self, lease_id: str, avoid: bool = False) -> None:
        """Give a lease back; where its worker is still wanted another takes its place (the same one
        only for lack of others when ``avoid`` is set). Returns when the worker knows, or after a short
        while; an unknown lease is no error.
        """
        if (held := self._let_go(lease_id, avoid)) is not None:
            await self._release(held.lease.worker, lease_id)

    def _let_go(self, lease_id: str, avoid: bool) -> Holding | None:
        if (held := self._held.pop(lease_id, None)) is not None:
            held.scope.cancel()
            self._apply(allocation.LeaseFailed(lease_id, avoid))
        return held

    async def close(self, timeout_s: float = RELEASE_TIMEOUT_S) -> None:
        """Give everything back, for at most ``timeout_s``, and end :meth:`run`."""
        for kind in self._allocator.kinds:
            self._apply(allocation.Want(kind, 0))
        self._unwanted |= {
            one.lease_id: one.worker for one in self._todo if isinstance(one, allocation.Dismiss)
        }
        self._todo.clear()
        self._running.cancel()  # which cuts off releases under way
        ending = {lease_id: held.lease.worker for lease_id, held in self._held.items()} | self._unwanted
        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                for lease_id, worker in ending.items():
                    nursery.start_soon(self._release, worker, lease_id)
        self._held.clear()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the pool; ``started`` once offers are answered."""
        self._node.answer(WorkerOffer, self._answer_offer)
        self._node.answer(WorkerLeaving, self._answer_leaving)
        self._node.prefer(lambda peer: any(lease.worker.peer == peer for lease in self.leases))
        with self._send, self._running:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._watch_peers)
                nursery.start_soon(self._watch_gateway)
                task_status.started()
                while True:
                    self._apply(Tick())
                    # nothing is awaited up to the wait below, so no event can slip in between
                    self._wake = wake = trio.Event()
                    todo, self._todo = self._todo, []
                    for action in todo:
                        self._carry_out(action, nursery)
                    adopted, self._adopted = self._adopted, []
                    for held in adopted:
                        nursery.start_soon(keep_renewed, held, self._node, self._changed)
                    next_wake = self._allocator.next_wake
                    with trio.move_on_at(math.inf if next_wake is None else next_wake):
                        await wake.wait()

    # --- deciding -----------------------------------------------------------------------------------

    def _apply(self, event: allocation.AllocatorEvent) -> list[allocation.AllocatorAction]:
        actions = self._allocator.handle(event, trio.current_time())
        self._todo.extend(actions)
        self._wake.set()
        return actions

    async def _answer_offer(self, caller: str, offer: WorkerOffer) -> Acknowledged:
        if self._running.cancel_called:
            raise Refused("not-found", "this scheduler is stopping")
        fields = {"lease_id": offer.lease_id, "worker_peer_id": caller}
        with span(RECEIVE_OFFER, {"hypha.lease": offer.lease_id, "hypha.peer": caller}):
            for action in self._apply(allocation.Offered(caller, offer)):
                if isinstance(action, allocation.Decline) and action.lease_id == offer.lease_id:
                    logger.debug("An offer was declined: %s.", action.reason, extra=fields)
                    if action.cause == "features":
                        self._versions.declined(caller, offer)
                    raise Refused(action.code, action.reason)
            text = "An offer is considered: %s at a price of %g."
            logger.debug(text, offer.resources, offer.price, extra=fields)
            if offer.lease_id not in self._held and (parent := traceparent()) is not None:
                self._offered_in[offer.lease_id] = parent
        return Acknowledged()

    async def _answer_leaving(self, caller: str, leaving: WorkerLeaving) -> Acknowledged:
        held = self._held.get(leaving.lease_id)
        if held is None or held.lease.worker.peer != caller or self._running.cancel_called:
            return Acknowledged()  # it is over here already, or was never this worker's
        if not (math.isfinite(leaving.left_s) and leaving.left_s >= 0):
            raise Refused("invalid", f"{leaving.left_s} is no time to be left")
        reason = printable(leaving.reason)
        if leaving.left_s == 0:
            held.handed_back = reason
            held.nudge.set()
            return Acknowledged()
        if not held.gained:
            raise Refused("busy", "the lease is just being accepted")
        now = trio.current_time()
        if math.isinf(held.leaves_at):
            text = "A leased worker ends in %.1f s (%s); another one is looked for."
            logger.info(text, leaving.left_s, reason, extra=held.log_fields)
            self._apply(allocation.WorkerLeaves(leaving.lease_id, leaving.left_s))
        # an announcement may bring the end forward, never put it off: the job must not hold a worker and its
        # replacement for ever
        held.leaves_at = min(now + leaving.left_s, held.leaves_at)
        held.nudge.set()
        # events are never dropped, so a worker must not be able to make many
        if now >= held.leaving_passed_on_at + LEAVING_PAUSE_S:
            held.leaving_passed_on_at = now
            self._tell(held, allocation.WorkerLeaves(leaving.lease_id, max(0.0, held.leaves_at - now)))
        return Acknowledged()

    def _carry_out(self, action: allocation.AllocatorAction, nursery: trio.Nursery) -> None:
        match action:
            case allocation.Advertise():
                nursery.start_soon(self._publish, action)
            case allocation.Accept(kind, offer, expires_at):
                lease_id, worker = offer.lease_id, offer.worker
                lease = LeaseGained(lease_id, worker, offer.resources, offer.price, kind, offer.version)
                held = self._start_holding(lease, expires_at - trio.current_time())
                nursery.start_soon(keep_renewed, held, self._node, self._changed)
            case allocation.Dismiss(lease_id, worker):
                self._offered_in.pop(lease_id, None)
                self._unwanted[lease_id] = worker
                nursery.start_soon(self._release, worker, lease_id)
            case allocation.GiveBack(lease_id):
                # a job that cannot begin gives way to others
                if (given := self._let_go(lease_id, avoid=False)) is None:
                    return
                if given.gained:
                    logger.info("A worker is %s.", _GIVEN_BACK, extra=given.log_fields)
                    self._tell(given, Lapsed(_GIVEN_BACK, refused=True))
                self._unwanted[lease_id] = given.lease.worker
                nursery.start_soon(self._release, given.lease.worker, lease_id)
            case allocation.Keep() | allocation.Decline():
                pass

    def _start_holding(self, lease: LeaseGained, expires_in_s: float, gained: bool = False) -> Holding:
        now, lease_id = trio.current_time(), lease.lease_id
        renewal = Renewal(expires_in_s, now, self._random, lease_id, self._journal)
        held = Holding(lease, renewal, gained, offered_in=self._offered_in.pop(lease_id, None))
        self._held[lease_id] = held
        self._node.learn(lease.worker)
        return held

    async def _publish(self, action: allocation.Advertise) -> None:
        kind = action.ask.kind
        if kind in self._publishing:
            # the one before still waits for a gateway to pass it on, and is the same request
            return
        now = trio.current_time()
        logged_at, logged_bid = self._logged.get(kind, (-math.inf, None))
        if now >= logged_at + REMIND_S or logged_bid != action.raised_bid:
            self._logged[kind] = now, action.raised_bid
            bid = action.raised_bid
            raised = "" if bid is None else f", at a bid that was raised to {bid:g}"
            logger.info("Looking for %d more workers for %s jobs%s.", action.count, kind, raised)
        self._publishing.add(kind)
        attributes = {"hypha.executor.class": kind, "hypha.request": action.ask.request_id}
        try:
            with span(ADVERTISE, {**attributes, "hypha.workers": action.count}, parent=self._traces.of_job):
                await self._node.publish(action.request(self._node.ref()))
        except NetworkError as exc:
            logger.debug("A request for workers was not published: %s", exc)
        else:
            WORKER_REQUESTS.add(kind=kind)
            logger.debug("A request for %d more workers for %s jobs was published.", action.count, kind)
        finally:
            self._publishing.discard(kind)

    # --- what becomes of one lease ------------------------------------------------------------------

    def _changed(self, held: Holding, change: Reported) -> None:
        match change:
            case allocation.Gained():
                logger.info("A worker was leased for %s jobs.", held.lease.kind, extra=held.log_fields)
                self._versions.leased(held.lease.kind, held.lease.worker.peer, Abilities(held.lease.version))
                self._apply(change)
                self._tell(held, change)
            case allocation.Contended():
                self._apply(change)
            case Suspected(reason):
                if held.gained:
                    logger.warning("A leased worker cannot be reached: %s.", reason, extra=held.log_fields)
                self._tell(held, change)
            case Recovered():
                self._tell(held, change)
            case Lapsed():
                self._lose(held, change)

    def _lose(self, held: Holding, lapsed: Lapsed) -> None:
        lease_id = held.lease.lease_id
        self._held.pop(lease_id, None)
        # a worker that ends its lease itself is well, and may be taken again
        self._apply(allocation.LeaseFailed(lease_id, avoid=not lapsed.refused))
        if not lapsed.refused or trio.current_time() >= held.overstays_at:
            # it may have received the renewals whose replies were lost, and keep its resources for nobody
            self._todo.append(allocation.Dismiss(lease_id, held.lease.worker))
        if not held.gained:
            logger.info("An offer could not be accepted: %s.", lapsed.reason, extra=held.log_fields)
        elif held.handed_back is not None:
            logger.info("A worker handed its lease back: %s.", held.handed_back, extra=held.log_fields)
        else:
            logger.warning("A lease was lost: %s.", lapsed.reason, extra=held.log_fields)
        self._tell(held, lapsed)

    def _tell(self, held: Holding, change: allocation.LeaseChange) -> None:
        # while the job ends, workers may still send something
        with contextlib.suppress(trio.ClosedResourceError):
            if held.gained:
                self._send.send_nowait(PoolEvent(held.lease, change))

    async def _release(self, worker: PeerRef, lease_id: str) -> None:
        async with self._releasing:
            try:
                await self._node.request(worker, ReleaseLease(lease_id=lease_id), RELEASE_TIMEOUT_S)
            except NetworkError as exc:
                fields = {"lease_id": lease_id, "worker_peer_id": worker.peer}
                logger.debug("A release was not delivered, so the lease will expire: %s", exc, extra=fields)
        self._unwanted.pop(lease_id, None)

    # --- hearing about the network ----------------------------------------------------------------------

    async def _watch_peers(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with self._node.watch_peers() as losses:
            task_status.started()
            async for lost in losses:
                for held in self._held.values():
                    if held.lease.worker.peer == lost.peer:
                        held.connection_lost = True
                        held.revoked = lost.revoked
                        held.nudge.set()

    async def _watch_gateway(self) -> None:
        seen = self._node.gateway_changed.count
        while True:
            seen = await self._node.gateway_changed.wait(seen)
            self._apply(allocation.GatewayChanged())
