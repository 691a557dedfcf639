"""The executors of a job: started under their leases, steered, replaced, and at last all finished.

Everything that is done for one executor happens in tasks of that executor alone, so a slow worker delays
nobody. One task an executor sends one directive at a time, so that what arrives is in the order of ``seq``:
the newest of each sort, repeated with growing pauses until it is acknowledged, or refused for good.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import msgspec
import trio

from hypha.backoff import Backoff
from hypha.config.job import DEFAULT_BATCH_SIZE, RoundsConfig
from hypha.errors import NetworkError, Refused
from hypha.messages import (
    CancelJob,
    CloseRound,
    Directive,
    DispatchJob,
    ExecutorClass,
    Finish,
    Job,
    PeerRef,
    Plan,
    Rejoin,
    SaveCheckpoint,
    Steer,
    slot_of,
)
from hypha.node import Node
from hypha.scheduler.descriptions import Descriptions
from hypha.scheduler.durable.starts import Generation
from hypha.scheduler.leasing.events import LeaseGained
from hypha.scheduler.rounds.events import GoesOn, Input, JobRefused, Joined, ParticipantLost, Send
from hypha.scheduler.rounds.policy import Start
from hypha.scheduler.status.round_traces import RoundTraces
from hypha.tracing import Attribute, span, trace_context
from hypha.tracing.operations import DISPATCH, PLAN

logger = logging.getLogger(__name__)

_DISPATCH_TIMEOUT_S = 30.0
_CANCEL_TIMEOUT_S = 15.0
_PAUSE_S = 0.5
_STEER_TIMEOUT_S = 10.0
#: the first and the longest pause before a directive is sent again, and their jitter
_STEER_PAUSES_S, _STEER_JITTER = (0.1, 5.0), (0.7, 1.3)
#: the number of the last directive, which is higher than any before it
_LAST_SEQ = 1 << 62

Key = tuple[str, ExecutorClass]


class Steering:
    """The directives for the executor under ``lease``, in the generation that ``start`` begins. :meth:`run`
    sends them until cancelled.
    """

    def __init__(self, node: Node, lease: LeaseGained, start: Start, traces: RoundTraces) -> None:
        self._node = node
        self._lease = lease
        self._stamp = start.stamp
        self._traces = traces
        self._waiting: OrderedDict[tuple[str, str], Directive] = OrderedDict()
        self._changed = trio.Event()
        self._seq = start.generation << 32

    def put(self, directive: Directive) -> None:
        """Send it, and not what it supersedes."""
        slot = slot_of(directive)
        self._waiting.pop(slot, None)
        self._waiting[slot] = directive
        self._changed.set()

    async def send_first(self, directive: Directive) -> None:
        """Send ``directive`` once, before all others. Raises :class:`NetworkError`."""
        self._seq += 1
        await self._node.request(self._lease.worker.peer, self._steer(directive), timeout_s=_STEER_TIMEOUT_S)

    def _steer(self, directive: Directive) -> Steer:
        return Steer(stamp=self._stamp, kind=self._lease.kind, seq=self._seq, directive=directive)

    async def run(self) -> None:
        """Send what is put, in order."""
        while True:
            while not self._waiting:
                self._changed = trio.Event()
                await self._changed.wait()
            slot, directive = next(iter(self._waiting.items()))
            self._seq += 1
            with self._traced(directive):
                await self._deliver(slot, directive)
            if self._waiting.get(slot) is directive:
                del self._waiting[slot]

    def _traced(self, directive: Directive) -> AbstractContextManager[object]:
        """In the trace of the round that ``directive`` is about, if it names one."""
        stamp, within = self._stamp, None
        if isinstance(directive, Plan | CloseRound | SaveCheckpoint):
            within = self._traces.of_round(stamp, directive.round)
        if not isinstance(directive, Plan) or within is None:
            return trace_context(within)
        attributes: dict[str, Attribute] = {
            "hypha.job": stamp.job_id,
            "hypha.job.generation": stamp.generation,
            "hypha.round": directive.round,
            "hypha.peer": self._lease.worker.peer,
            "hypha.batches": -1 if directive.batches is None else directive.batches,
        }
        return span(PLAN, attributes, parent=within)

    async def _deliver(self, slot: tuple[str, str], directive: Directive) -> None:
        """Until it is acknowledged, superseded or refused for good."""
        backoff, steer = Backoff(*_STEER_PAUSES_S, jitter=_STEER_JITTER), self._steer(directive)
        fields = {"worker_peer_id": self._lease.worker.peer, "job_id": steer.stamp.job_id}
        while self._waiting.get(slot) is directive:
            try:
                await self._node.request(self._lease.worker.peer, steer, timeout_s=_STEER_TIMEOUT_S)
                logger.debug("%s was delivered", type(directive).__name__, extra={**fields, "seq": steer.seq})
                return
            except Refused as exc:
                # an executor that is being started is not found yet
                if not exc.retryable and exc.code != "not-found":
                    logger.warning("%s was refused: %s", type(directive).__name__, exc, extra=fields)
                    return
                logger.debug("%s has to wait: %s", type(directive).__name__, exc, extra=fields)
            except NetworkError as exc:
                logger.debug("%s was not delivered: %s", type(directive).__name__, exc, extra=fields)
            await trio.sleep(backoff.next_s())


@dataclass
class _Executor:
    lease: LeaseGained
    steering: Steering
    batch_size: int
    #: runs since an earlier generation, as far as is known here
    rejoins: bool
    #: the incarnation that it replaces, after a pause
    instead_of: str
    pause_s: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class JobExecutors:
    """``handle`` gets what happens here as events of the round machine. Leases ``left`` by an earlier
    scheduler may have executors. What is dispatched is traced as ``traces`` decide. :meth:`begin_generation`
    comes first.
    """

    _descriptions: Descriptions
    _generation: Generation
    #: the inner steps of the job so far
    _steps: Callable[[], int]

    def __init__(
        self,
        node: Node,
        nursery: trio.Nursery,
        handle: Callable[[Input], object],
        left: Iterable[LeaseGained],
        traces: RoundTraces,
    ) -> None:
        self._node = node
        self._nursery = nursery
        self._handle = handle
        self._traces = traces
        self._executors: dict[Key, _Executor] = {}
        self.leases: dict[Key, LeaseGained] = {(lease.worker.peer, lease.kind): lease for lease in left}
        #: leases under which an executor of this job may run
        self._started = {lease.lease_id for lease in self.leases.values()}
        self._batches_logged = False

    def holds(self, peer: str, kind: str | None = None) -> bool:
        """Whether ``peer`` is leased, for executors of ``kind``."""
        return any(holder == peer and kind in (None, of) for holder, of in self.leases)

    @property
    def server(self) -> PeerRef | None:
        for (_, kind), lease in self.leases.items():
            if kind == "aggregate":
                return lease.worker
        return None

    def begin_generation(
        self, descriptions: Descriptions, generation: Generation, steps: Callable[[], int]
    ) -> None:
        """From now on executors are as this generation needs them: training executors that run go on in it,
        and so does a parameter server that runs; others are started.
        """
        for key in list(self._executors):
            self._executors.pop(key).scope.cancel()
        self._descriptions, self._generation, self._steps = descriptions, generation, steps
        self._start_waiting()

    def gained(self, lease: LeaseGained) -> None:
        self.leases[lease.worker.peer, lease.kind] = lease
        self._start_waiting()

    def lost(self, peer: str, kind: ExecutorClass) -> LeaseGained | None:
        """Nothing more is to be done there."""
        executor = self._executors.pop((peer, kind), None)
        if executor is not None:
            executor.scope.cancel()
        return self.leases.pop((peer, kind), None)

    def send(self, action: Send) -> None:
        """Steer; for who is gone it does nothing."""
        executor = self._executors.get((action.to.peer, action.kind))
        if executor is not None:
            executor.steering.put(action.directive)

    def _start_waiting(self) -> None:
        server, descriptions = self.server, self._descriptions
        if server is None:
            return
        for key, lease in self.leases.items():
            if lease.kind == "aggregate" and lease.worker != server:
                # it takes the place of the one that leaves, once that is gone
                continue
            if key in self._executors:
                continue
            train = lease.kind == "train"
            rejoins = lease.lease_id in self._started and (train or self._generation.start.taken_over)
            batch = descriptions.batch_size(lease.resources) if train else 1
            if train:
                self._log_batches(descriptions.config.rounds, batch, lease)
            # before the worker gets the job, as its first event may overtake the reply
            self._handle(Joined(lease.worker, lease.kind, batch))
            self._start(lease, batch, rejoins)

    def again(self, peer: str, instead_of: str, pause_s: float) -> None:
        """Start the training executor there once more; nothing when its lease is over."""
        failed = self._executors.get((peer, "train"))
        if failed is not None:
            failed.scope.cancel()
            self._start(failed.lease, failed.batch_size, False, instead_of, pause_s)

    def _start(
        self, lease: LeaseGained, batch: int, rejoins: bool, instead_of: str = "", pause_s: float = 0.0
    ) -> None:
        steering = Steering(self._node, lease, self._generation.start, self._traces)
        executor = _Executor(lease, steering, batch, rejoins, instead_of, pause_s)
        self._executors[lease.worker.peer, lease.kind] = executor
        self._nursery.start_soon(self._run, executor)

    def _log_batches(self, rounds: RoundsConfig, batch: int, lease: LeaseGained) -> None:
        """Once, how large batches are where the configuration leaves it open."""
        if rounds.batch_size is not None or self._batches_logged:
            return
        self._batches_logged = True
        logger.info(
            "The first worker trains with batches of %d samples, by what it offers and the default of %d; "
            "rounds.batch_size sets another size for all",
            batch,
            min(DEFAULT_BATCH_SIZE, rounds.max_batch_size),
            extra={"worker_peer_id": lease.worker.peer, "lease_id": lease.lease_id},
        )

    async def _run(self, executor: _Executor) -> None:
        descriptions, generation, server = self._descriptions, self._generation, self.server
        lease, peer = executor.lease, executor.lease.worker.peer
        fields = {"worker_peer_id": peer, "job_id": generation.start.job_id, "lease_id": lease.lease_id}
        with executor.scope:
            if server is None:
                return  # another generation begins
            if executor.rejoins and await self._rejoin(executor, generation, server, fields):
                await executor.steering.run()
                return
            if executor.rejoins and lease.kind == "aggregate":
                # what it held is gone; from its own generation on it is started anew
                self._started.discard(lease.lease_id)
                self._handle(ParticipantLost(peer, lease.kind, "its executor does not run any more"))
                return
            if executor.instead_of:
                await trio.sleep(executor.pause_s)
                self._handle(Joined(lease.worker, lease.kind, executor.batch_size))
            elif lease.lease_id in self._started:
                # if this is not delivered, the new job replaces the executor of an earlier generation
                stop = CancelJob(job_id=generation.start.job_id, kind=lease.kind)
                await self._try_once(peer, stop, _CANCEL_TIMEOUT_S, "The request to stop an earlier executor")
            self._started.add(lease.lease_id)
            job: Job
            if lease.kind == "train":
                job = descriptions.train(peer, server, executor.batch_size, self._steps())
            else:
                job = descriptions.aggregate(peer, generation.restore(descriptions.scheduler))
            if await self._dispatch(job, executor, fields):
                await executor.steering.run()

    async def _rejoin(
        self, executor: _Executor, generation: Generation, server: PeerRef, fields: dict[str, str]
    ) -> bool:
        """Have the executor that runs there go on in this generation; False when there is none."""
        start, lease = generation.start, executor.lease
        directive = Rejoin(
            generation=start.generation,
            round=start.round,
            steps=start.steps,
            parameter_server=server if lease.kind == "train" else None,
            resend=not start.taken_over,
            start_over=generation.rounds_lost,
        )
        send = partial(executor.steering.send_first, directive)
        refused = await _insist(send, f"The request to go on to the {lease.kind} executor", fields)
        if refused is not None:
            logger.info("The %s executor refused to go on: %s", lease.kind, refused, extra=fields)
            return False
        logger.info("The %s executor goes on", lease.kind, extra=fields)
        self._handle(GoesOn(lease.worker.peer, lease.kind))
        return True

    async def _dispatch(self, job: Job, executor: _Executor, fields: dict[str, str]) -> bool:
        """Start ``job`` there; False when it is refused."""
        lease, worker = executor.lease, executor.lease.worker.peer
        attributes: dict[str, Attribute] = {
            "hypha.job": job.job_id,
            "hypha.job.generation": job.generation,
            "hypha.lease": lease.lease_id,
            "hypha.peer": worker,
        }
        with span(DISPATCH, attributes, parent=self._traces.of_job):
            if (traced := self._traces.dispatching(worker, lease.kind)) is not None:
                job = msgspec.structs.replace(job, traced=traced)
            request = DispatchJob(lease_id=lease.lease_id, job=job, instead_of=executor.instead_of)
            send = partial(self._node.request, worker, request, timeout_s=_DISPATCH_TIMEOUT_S)
            refused = await _insist(send, f"The {lease.kind} job", fields)
        if refused is not None:
            logger.warning("A worker refused the %s job: %s", lease.kind, refused, extra=fields)
            self._handle(JobRefused(worker, lease.kind, f"{refused.reason} ({refused.code})"))
            return False
        logger.info("The %s job was dispatched", lease.kind, extra=fields)
        return True

    async def finish(self, reason: str, timeout_s: float) -> None:
        """Send all executors their last directive, for at most ``timeout_s``."""
        executors, stamp = list(self._executors.values()), self._generation.start.stamp
        self._executors.clear()
        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                for executor in executors:
                    executor.scope.cancel()
                    lease, finish = executor.lease, Finish(reason=reason)
                    last = Steer(stamp=stamp, kind=lease.kind, seq=_LAST_SEQ, directive=finish)
                    peer, what = lease.worker.peer, "The last directive"
                    nursery.start_soon(self._try_once, peer, last, timeout_s, what)

    async def _try_once(self, peer: str, request: CancelJob | Steer, timeout_s: float, what: str) -> None:
        try:
            await self._node.request(peer, request, timeout_s=timeout_s)
        except NetworkError as exc:
            logger.debug("%s was not delivered: %s", what, exc, extra={"worker_peer_id": peer})


async def _insist(send: Callable[[], Awaitable[object]], what: str, fields: dict[str, str]) -> Refused | None:
    """Send until it is acknowledged, or return why it is refused for good; how long that is worth trying, the
    lease decides.
    """
    while True:
        try:
            await send()
            return None
        except Refused as exc:
            if not exc.retryable:
                return exc
            logger.info("%s has to wait: %s", what, exc, extra=fields)
        except NetworkError as exc:
            logger.warning("%s was not delivered: %s", what, exc, extra=fields)
        await trio.sleep(_PAUSE_S)
