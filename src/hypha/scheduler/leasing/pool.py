"""The allocator's loop: a pool of leased workers that is kept full and kept alive.

:class:`Pool` advertises while workers are missing, takes the best offers and renews every lease in a
task of its own, so a slow worker never delays another's renewal. What becomes of leases is told through
:attr:`Pool.events`. A connection that breaks makes its leases be renewed at once: a dead worker is
suspected within moments, long before its lease ends, but it is lost only when the lease expires, the
worker itself says that it has ended, or its machine says for a while that nobody is there any more.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from random import Random

import trio
from msgspec import Struct

from hypha.config.job import JobResourcesConfig
from hypha.errors import NetworkError, PeerUnreachable, Refused
from hypha.features import printable, stated
from hypha.journal import Journal
from hypha.leases import Tick
from hypha.messages import (
    Acknowledged,
    ExecutorClass,
    ExecutorDescriptor,
    LeaseRenewed,
    LedgerRound,
    PeerRef,
    ReleaseLease,
    RenewLease,
    Resources,
    WorkerLeaving,
    WorkerOffer,
)
from hypha.node import Node
from hypha.runtime import chance, new_id
from hypha.scheduler.leasing.allocator import Allocator
from hypha.scheduler.leasing.events import (
    Accept,
    Adopted,
    Advertise,
    AllocatorAction,
    AllocatorEvent,
    Begun,
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
from hypha.scheduler.leasing.renewal_spans import RenewalSpans
from hypha.scheduler.leasing.track_records import TrackRecord
from hypha.scheduler.status.round_traces import RoundTraces
from hypha.scheduler.status.versions import StatedVersions
from hypha.telemetry.instruments import WORKER_REQUESTS
from hypha.tracing import span, traceparent
from hypha.tracing.operations import ADVERTISE, RECEIVE_OFFER

logger = logging.getLogger(__name__)

#: How long a courtesy release may take; the lease expires anyway.
RELEASE_TIMEOUT_S = 2.0
#: Releases at once: few, since acceptances are more urgent.
MAX_RELEASES = 4
#: What a worker says of its end is passed on at most this often; it says so once a second.
LEAVING_PAUSE_S = 0.2
#: A worker that has not ended so long after it was to, is given back.
OVERSTAY_S = 5.0
#: While workers are missing, it is said again after this long.
REMIND_S = 15.0


class LeaseGained(Struct, frozen=True):
    """A worker is held: jobs of ``kind`` may be dispatched under ``lease_id``. The ledger keeps it, so that
    another scheduler of the job can go on with it. ``version`` is the worker's, where it states one.
    """

    lease_id: str
    worker: PeerRef
    resources: Resources
    price: float
    kind: ExecutorClass
    version: str = ""


#: How long a lease that an earlier scheduler gained is believed in until its worker confirms it. It may live
#: for longer, but nobody is known to hold up the job for.
ADOPT_S = 10.0


@dataclass(frozen=True)
class HeldLease:
    """A lease that is held, as it stands: it ends at ``expires_at`` of trio's clock unless it is renewed."""

    lease: LeaseGained
    expires_at: float
    suspected: bool
    #: when its worker ends, where that has said so
    leaves_at: float | None = None


@dataclass(frozen=True)
class LeaseSuspect:
    """The worker cannot be reached, repeatedly; its lease still lives."""

    lease_id: str
    worker: PeerRef
    kind: ExecutorClass
    reason: str


@dataclass(frozen=True)
class LeaseRecovered:
    """A suspected worker answered again."""

    lease_id: str
    worker: PeerRef
    kind: ExecutorClass


@dataclass(frozen=True)
class LeaseLost:
    """The lease expired, or the worker ended it. Not said of a lease that :meth:`Pool.release` gave back."""

    lease_id: str
    worker: PeerRef
    kind: ExecutorClass
    reason: str
    #: it did not end the lease itself
    to_blame: bool = True


@dataclass(frozen=True)
class LeaseLeaving:
    """The worker ends in ``left_s`` seconds; its lease lives until then, and another worker is looked for.
    Told again whenever the worker says so.
    """

    lease_id: str
    worker: PeerRef
    kind: ExecutorClass
    left_s: float
    reason: str


PoolEvent = LeaseGained | LeaseSuspect | LeaseRecovered | LeaseLeaving | LeaseLost


def asks_from(
    resources: JobResourcesConfig,
    dataset: str | None = None,
    needs: Mapping[ExecutorClass, tuple[str, ...]] | None = None,
    most_batch: int | None = None,
) -> tuple[Search, Search]:
    """Whom a job looks for: training executors and a parameter server, under new request ids. ``needs`` are
    the features that each must have; ``most_batch`` is how often a worker can use what is asked of it.
    """
    needs = needs or {}
    return (
        Search(
            request_id=new_id(),
            executor=ExecutorDescriptor(kind="train", name=resources.worker_executor),
            resources=Resources(**resources.worker.model_dump()),
            bid=resources.worker_price.bid,
            max_price=resources.worker_price.max,
            dataset=dataset,
            needs=needs.get("train", ()),
            useful=most_batch,
            raise_after_s=resources.worker_price.raise_after_s,
            raise_by=resources.worker_price.raise_by,
            least=resources.min_workers or resources.num_workers,
        ),
        Search(
            request_id=new_id(),
            executor=ExecutorDescriptor(kind="aggregate", name=resources.parameter_server_executor),
            resources=Resources(**resources.parameter_server.model_dump()),
            bid=resources.parameter_server_price.bid,
            max_price=resources.parameter_server_price.max,
            needs=needs.get("aggregate", ()),
            useful=1.0,
            raise_after_s=resources.parameter_server_price.raise_after_s,
            raise_by=resources.parameter_server_price.raise_by,
            least=1,
        ),
    )


@dataclass(eq=False)
class _Held:
    """A lease that is being accepted, or held."""

    kind: ExecutorClass
    offer: WorkerOffer
    expires_at: float
    gained: bool = False
    suspected: bool = False
    connection_lost: bool = False
    revoked: bool = False
    #: when its worker ends, where that has said so; and why it has ended the lease itself
    leaves_at: float | None = None
    handed_back: str | None = None
    #: when that was passed on last
    leaving_told_at: float = -math.inf
    #: others ask its worker for what it holds; one of them has asked for longer
    contention: tuple[bool, bool] = (False, False)
    nudge: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    #: the ``traceparent`` of the span in which its offer was received
    offered_in: str | None = None

    @property
    def overstays_at(self) -> float:
        """When it should have ended for a while, if it ends."""
        return math.inf if self.leaves_at is None else self.leaves_at + OVERSTAY_S

    @property
    def log_fields(self) -> dict[str, str]:
        return {"lease_id": self.offer.lease_id, "worker_peer_id": self.offer.worker.peer}

    @property
    def attributes(self) -> dict[str, str]:
        """Of its spans."""
        return {"hypha.lease": self.offer.lease_id, "hypha.peer": self.offer.worker.peer}


class Pool:
    """Workers for ``asks``, held through ``node``. :meth:`run` does the work; it runs until cancelled or
    until :meth:`close`, and then ends :attr:`events`. One pool a node: it answers all offers.
    """

    def __init__(
        self,
        node: Node,
        asks: Iterable[Search],
        pace: SearchTimes | None = None,
        random: Random | None = None,
        journal: Journal | None = None,
        traces: RoundTraces | None = None,
    ) -> None:
        self._node = node
        self._journal = journal
        self._traces = traces or RoundTraces(None)
        asks = tuple(asks)
        self._allocator = Allocator(asks, pace, journal)
        self._versions = StatedVersions(asks)
        self._random = random or chance()
        self._held: dict[str, _Held] = {}
        self._todo: list[AllocatorAction] = []
        self._wake = trio.Event()
        self._running = trio.CancelScope()
        self._releasing = trio.CapacityLimiter(MAX_RELEASES)
        #: offers that were not taken and whose workers may not have heard it yet
        self._unwanted: dict[str, PeerRef] = {}
        #: lease on the table -> ``traceparent`` of the span in which its offer was received
        self._offered_in: dict[str, str] = {}
        #: when it was last said that workers are missing, and at which raised bid
        self._reminded: dict[ExecutorClass, tuple[float, float | None]] = {}
        self._publishing: set[ExecutorClass] = set()
        self._begun = False
        #: those that nobody renews yet
        self._adopted: list[_Held] = []
        # unbounded, so that renewals never wait for whoever reads; a few events a lease
        self._send, self._receive = trio.open_memory_channel[PoolEvent](math.inf)

    @property
    def events(self) -> trio.MemoryReceiveChannel[PoolEvent]:
        """What becomes of leases, in order; for one reader."""
        return self._receive

    @property
    def leases(self) -> tuple[LeaseGained, ...]:
        """All leases held now."""
        return tuple(_gained(held) for held in self._held.values() if held.gained)

    def _is_partner(self, peer: str) -> bool:
        return any(held.gained and held.offer.worker.peer == peer for held in self._held.values())

    @property
    def held(self) -> tuple[HeldLease, ...]:
        """All leases held now, and how long they live."""
        return tuple(
            HeldLease(_gained(held), held.expires_at, held.suspected, held.leaves_at)
            for held in self._held.values()
            if held.gained
        )

    def missing(self, kind: ExecutorClass) -> int:
        """How many more workers of ``kind`` are wanted than taken."""
        return self._allocator.missing(kind)

    def shortage(self, kind: ExecutorClass) -> str:
        """Which workers lack a feature that ``kind`` jobs need, or may lack one; empty where none can."""
        return self._versions.shortage(kind)

    def want(self, kind: ExecutorClass, count: int) -> None:
        """Hold ``count`` workers of ``kind``. With fewer than are held nothing is released by itself."""
        self._apply(Want(kind, count))

    def bid(self, kind: ExecutorClass) -> float:
        """What is bid for a worker of ``kind`` now."""
        return self._allocator.bid(kind)

    def begin(self) -> None:
        """The job trains: what it holds is not given back any more for lack of the rest. Repeats are free."""
        if not self._begun:
            self._begun = True
            self._apply(Begun())

    def know(self, record: TrackRecord) -> None:
        """What the ledger has of a worker: it counts when offers are compared."""
        self._apply(record)

    def worked(self, entry: LedgerRound) -> None:
        """A round was applied: how fast each worker was in it is known."""
        if entry.duration_s > 0:
            parts = {part.worker: part.samples / entry.duration_s for part in entry.contributors}
            self._apply(Worked(tuple(parts.items())))

    def adopt(self, leases: Iterable[LeaseGained]) -> None:
        """Go on with leases of an earlier scheduler: they count as held, without :class:`LeaseGained`, and
        are renewed at once; :class:`LeaseLost` is said of those that their workers do not know, or that
        nobody confirms. Before or while :meth:`run` runs.
        """
        now = trio.current_time()
        for lease in leases:
            offer = WorkerOffer(
                lease_id=lease.lease_id,
                request_id="",
                worker=lease.worker,
                resources=lease.resources,
                price=lease.price,
                expires_in_s=ADOPT_S,
                version=lease.version,
            )
            held = _Held(lease.kind, offer, now + ADOPT_S, gained=True)
            self._held[lease.lease_id] = held
            self._node.learn(lease.worker)
            self._apply(Adopted(lease.kind, lease.lease_id, lease.worker.peer))
            self._adopted.append(held)

    async def release(self, lease_id: str, avoid: bool = False) -> None:
        """Give a lease back; where its worker is still wanted another takes its place (the same one
        only for lack of others when ``avoid`` is set). Returns when the worker knows, or after a short
        while; an unknown lease is no error.
        """
        held = self._held.pop(lease_id, None)
        if held is None:
            return
        held.scope.cancel()
        self._apply(LeaseFailed(lease_id, avoid))
        await self._release(held.offer.worker, lease_id)

    async def close(self, timeout_s: float = RELEASE_TIMEOUT_S) -> None:
        """Give everything back, for at most ``timeout_s``, and end :meth:`run`."""
        for kind in self._allocator.kinds:
            self._apply(Want(kind, 0))
        self._unwanted |= {one.lease_id: one.worker for one in self._todo if isinstance(one, Dismiss)}
        self._todo.clear()
        self._running.cancel()  # which cuts off those that are just being told
        ending = {lease_id: held.offer.worker for lease_id, held in self._held.items()} | self._unwanted
        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                for lease_id, worker in ending.items():
                    nursery.start_soon(self._release, worker, lease_id)
        self._held.clear()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the pool; ``started`` once offers are answered."""
        self._node.answer(WorkerOffer, self._answer_offer)
        self._node.answer(WorkerLeaving, self._answer_leaving)
        self._node.prefer(self._is_partner)
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
                        nursery.start_soon(self._hold, held)
                    next_wake = self._allocator.next_wake
                    with trio.move_on_at(math.inf if next_wake is None else next_wake):
                        await wake.wait()

    # --- deciding -----------------------------------------------------------------------------------

    def _apply(self, event: AllocatorEvent) -> list[AllocatorAction]:
        actions = self._allocator.handle(event, trio.current_time())
        self._todo.extend(actions)
        self._wake.set()
        return actions

    async def _answer_offer(self, caller: str, offer: WorkerOffer) -> Acknowledged:
        if self._running.cancel_called:
            raise Refused("not-found", "this scheduler is stopping")
        fields = {"lease_id": offer.lease_id, "worker_peer_id": caller}
        with span(RECEIVE_OFFER, {"hypha.lease": offer.lease_id, "hypha.peer": caller}):
            for action in self._apply(Offered(caller, offer)):
                if isinstance(action, Decline) and action.lease_id == offer.lease_id:
                    logger.debug("An offer was declined: %s.", action.reason, extra=fields)
                    if action.cause == "features":
                        self._versions.declined(caller, offer)
                    raise Refused(action.code, action.reason)
            logger.debug(
                "An offer is on the table: %s at a price of %g.",
                offer.resources,
                offer.price,
                extra=fields,
            )
            if offer.lease_id not in self._held and (parent := traceparent()) is not None:
                self._offered_in[offer.lease_id] = parent
        return Acknowledged()

    async def _answer_leaving(self, caller: str, leaving: WorkerLeaving) -> Acknowledged:
        held = self._held.get(leaving.lease_id)
        if held is None or held.offer.worker.peer != caller or self._running.cancel_called:
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
        if held.leaves_at is None:
            logger.info(
                "A leased worker ends in %.1f s (%s); another one is looked for.",
                leaving.left_s,
                reason,
                extra=held.log_fields,
            )
            self._apply(WorkerLeaves(leaving.lease_id))
        now = trio.current_time()
        # said again it may be sooner, never later: a place is not to be doubled for ever
        held.leaves_at = min(now + leaving.left_s, math.inf if held.leaves_at is None else held.leaves_at)
        held.nudge.set()
        # events are never dropped, so a worker must not be able to make many
        if now >= held.leaving_told_at + LEAVING_PAUSE_S:
            held.leaving_told_at = now
            left_s = max(0.0, held.leaves_at - now)
            self._tell(held, LeaseLeaving(leaving.lease_id, held.offer.worker, held.kind, left_s, reason))
        return Acknowledged()

    def _carry_out(self, action: AllocatorAction, nursery: trio.Nursery) -> None:
        match action:
            case Advertise():
                nursery.start_soon(self._advertise, action)
            case Accept(kind, offer, expires_at):
                offered_in = self._offered_in.pop(offer.lease_id, None)
                held = _Held(kind, offer, expires_at, offered_in=offered_in)
                self._held[offer.lease_id] = held
                self._node.learn(offer.worker)
                nursery.start_soon(self._hold, held)
            case Dismiss(lease_id, worker):
                self._offered_in.pop(lease_id, None)
                self._unwanted[lease_id] = worker
                nursery.start_soon(self._release, worker, lease_id)
            case GiveBack(lease_id):
                self._give_back(lease_id, nursery)
            case Keep() | Decline():
                pass

    def _give_back(self, lease_id: str, nursery: trio.Nursery) -> None:
        """A job that cannot begin gives way to others."""
        held = self._held.pop(lease_id, None)
        if held is None:
            return
        held.scope.cancel()
        self._apply(LeaseFailed(lease_id, avoid=False))
        reason = "given back, as there are too few workers to begin, and other schedulers ask for this one"
        if held.gained:
            logger.info("A worker is %s.", reason, extra=held.log_fields)
            self._tell(held, LeaseLost(lease_id, held.offer.worker, held.kind, reason, False))
        self._unwanted[lease_id] = held.offer.worker
        nursery.start_soon(self._release, held.offer.worker, lease_id)

    async def _advertise(self, action: Advertise) -> None:
        kind = action.ask.kind
        if kind in self._publishing:
            # the one before still waits for a gateway to pass it on; it says the same
            return
        now = trio.current_time()
        said_at, said_bid = self._reminded.get(kind, (-math.inf, None))
        if now >= said_at + REMIND_S or said_bid != action.raised_bid:
            self._reminded[kind] = now, action.raised_bid
            raised = (
                "" if action.raised_bid is None else f", at a bid that was raised to {action.raised_bid:g}"
            )
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

    # --- holding one lease ----------------------------------------------------------------------------

    async def _hold(self, held: _Held) -> None:
        with (
            held.scope,
            RenewalSpans(held.attributes, held.offered_in, held.gained) as spans,
        ):
            now = trio.current_time()
            life_s, lease_id = held.expires_at - now, held.offer.lease_id
            renewal = Renewal(life_s, now, self._random, lease_id, self._journal)
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
                                self._suspect(held, reason)
                            case Recovered():
                                self._tell(
                                    held, LeaseRecovered(held.offer.lease_id, held.offer.worker, held.kind)
                                )
                            case Lapsed(reason, refused):
                                spans.failed("lease lost", reason)
                                self._lose(held, reason, refused)
                                return
                held.expires_at, held.suspected = renewal.expires_at, renewal.suspected
                events = []
                if attempt is not None:
                    with spans.attempt():
                        answer = await self._attempt(held, attempt.timeout_s)
                    if isinstance(answer, Renewed):
                        if not held.gained:
                            self._gain(held)
                        spans.renewed()
                    events.append(answer)
                else:
                    with trio.move_on_at(min(renewal.next_wake, held.overstays_at)):
                        await held.nudge.wait()
                    held.nudge = trio.Event()
                    events.append(Tick())
                if trio.current_time() >= held.overstays_at and held.handed_back is None:
                    held.handed_back = "it was to have ended by now"
                    self._todo.append(Dismiss(held.offer.lease_id, held.offer.worker))
                if held.revoked:
                    events = [CertificateRevoked()]
                elif held.handed_back is not None:
                    events = [RenewalRefused("lease", f"its worker hands it back: {held.handed_back}")]
                elif held.connection_lost:
                    held.connection_lost = False
                    # after an answer the lessor may have died; before a failure it explains that one
                    events.insert(isinstance(events[0], Renewed), ConnectionLost())

    async def _attempt(self, held: _Held, timeout_s: float) -> RenewalEvent:
        lease_id, peer = held.offer.lease_id, held.offer.worker.peer
        try:
            answer = await self._node.request(peer, RenewLease(lease_id=lease_id), timeout_s=timeout_s)
        except Refused as exc:
            return RenewalRefused(exc.code, exc.reason)
        except NetworkError as exc:
            logger.debug("A renewal failed: %s", exc, extra=held.log_fields)
            unreachable = isinstance(exc, PeerUnreachable)
            return RenewalFailed(str(exc), unreachable, isinstance(exc, PeerUnreachable) and exc.gone)
        if not isinstance(answer, LeaseRenewed) or answer.lease_id != lease_id:
            return RenewalFailed(f"the answer was {type(answer).__name__}")
        logger.info("Lease renewed successfully", extra=held.log_fields)
        if (contention := (answer.contended, answer.outranked)) != held.contention:
            held.contention = contention
            self._apply(Contended(lease_id, *contention))
        return Renewed(answer.expires_in_s)

    def _gain(self, held: _Held) -> None:
        held.gained = True
        logger.info("A worker was leased for %s jobs.", held.kind, extra=held.log_fields)
        self._versions.leased(held.kind, held.offer.worker.peer, stated(held.offer))
        self._apply(Gained(held.offer.lease_id))
        self._tell(held, _gained(held))

    def _suspect(self, held: _Held, reason: str) -> None:
        if held.gained:
            logger.warning("A leased worker cannot be reached: %s.", reason, extra=held.log_fields)
            self._tell(held, LeaseSuspect(held.offer.lease_id, held.offer.worker, held.kind, reason))

    def _lose(self, held: _Held, reason: str, refused: bool) -> None:
        self._held.pop(held.offer.lease_id, None)
        # one that says so itself is well, and may be taken again
        self._apply(LeaseFailed(held.offer.lease_id, avoid=not refused))
        if not refused:
            # it may have heard the renewals whose answers were lost, and keep its resources for nobody
            self._todo.append(Dismiss(held.offer.lease_id, held.offer.worker))
        if held.gained:
            if held.handed_back is not None:
                logger.info("A worker handed its lease back: %s.", held.handed_back, extra=held.log_fields)
            else:
                logger.warning("A lease was lost: %s.", reason, extra=held.log_fields)
            lost = LeaseLost(held.offer.lease_id, held.offer.worker, held.kind, reason, not refused)
            self._tell(held, lost)
        else:
            logger.info("An offer could not be accepted: %s.", reason, extra=held.log_fields)

    def _tell(self, held: _Held, event: PoolEvent) -> None:
        # while the job ends, workers may say something still
        with contextlib.suppress(trio.ClosedResourceError):
            if held.gained:
                self._send.send_nowait(event)

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
                    if held.offer.worker.peer == lost.peer:
                        held.connection_lost = True
                        held.revoked = lost.revoked
                        held.nudge.set()

    async def _watch_gateway(self) -> None:
        seen = self._node.gateway_changed.count
        while True:
            seen = await self._node.gateway_changed.wait(seen)
            self._apply(GatewayChanged())


def _gained(held: _Held) -> LeaseGained:
    offer = held.offer
    return LeaseGained(offer.lease_id, offer.worker, offer.resources, offer.price, held.kind, offer.version)
