"""Everything that goes into and out of one executor: its bridge's requests, files, directives and events.

What the executor asks for is judged here: it is somebody else's program, and reaches nobody outside its job.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from hypha.config.models import ExecutorConfig, WorkerConfig
from hypha.errors import Refused
from hypha.messages import (
    Alive,
    Delivery,
    Directive,
    Event,
    ExecutorClass,
    ExecutorError,
    FetchedFile,
    FinishedSpan,
    Job,
    JobStamp,
    Local,
    Members,
    PeerRef,
    Peers,
    Progress,
    ReceivedFile,
    Reference,
    Rejoin,
    Report,
    Request,
    Response,
    RoundStarted,
    SchedulerData,
    SendCall,
    SendModel,
    Sent,
    TrainJob,
    TransferMeta,
)
from hypha.net.bulk.transfers import with_hashes
from hypha.node import Node
from hypha.rules.leases import Lease
from hypha.runtime import in_thread, lack_of_space
from hypha.worker.bridge.feeds import Directives, Feed, FileArrivals
from hypha.worker.bridge.outbox import Outbox
from hypha.worker.fetch.allowance import Allowance
from hypha.worker.fetch.connectors import Connectors
from hypha.worker.fetch.local import Keeping, store_local
from hypha.worker.jobs.deliveries import Deliveries
from hypha.worker.jobs.directory import JobDirectory
from hypha.worker.jobs.execution_signals import ExecutionSignals
from hypha.worker.jobs.inbox import ExecutorInbox
from hypha.worker.jobs.starting import ExecutorBackend
from hypha.worker.jobs.watch import Patience, Watch
from hypha.worker.limits.limits import Means
from hypha.worker.slices.cache import SliceCache
from hypha.worker.slices.manifest_check import ManifestCheck
from hypha.worker.slices.prefetching import SliceDemand, SlicePrefetcher

logger = logging.getLogger(__name__)

#: Threads that work on job directories: those of one job may take all of them, and no others of the worker.
FILES = trio.CapacityLimiter(4)


@dataclass(frozen=True)
class ExecutionContext:
    """What all executors of a worker share."""

    node: Node
    config: WorkerConfig
    cache: SliceCache
    allowance: Allowance
    connectors: Connectors
    means: Means
    environment: Mapping[str, str]
    backend: ExecutorBackend


class ExecutorTraffic:
    """That of the executor of ``job`` under ``lease``. ``stop`` ends the executor, for a reason, and returns
    False where it was to end anyway. This has the job's directory, and answers the executor's bridge
    (:class:`~hypha.worker.bridge.server.BridgeHandlers`).
    """

    def __init__(
        self,
        context: ExecutionContext,
        lease: Lease,
        job: Job,
        executor: ExecutorConfig,
        stop: Callable[[str], bool],
    ) -> None:
        self._context = context
        self._job = job
        self._stop = stop
        #: of the job's current generation; the executor was started in an earlier one, if the job has
        #: rejoined
        self.generation = job.generation
        self.round = self._attempt = 0
        self.directory = JobDirectory.create(context.config.work_dir)
        self.incarnation = self.directory.path.name
        self.fields = {"job_id": job.job_id, "lease_id": lease.lease_id, "executor": executor.name}
        self.watch = Watch(Patience.of(context.config, executor, job), trio.current_time())
        self.signals = ExecutionSignals(job, self.kind, lease.lease_id, context.backend.emit_spans)
        self.outbox = Outbox(self._ask_scheduler, self.kind, self.incarnation)
        self._directives = Directives()
        self._arrivals = FileArrivals(self.directory.path)
        self._deliveries = Deliveries(context.node.transfers.send)
        # Who takes part; for an aggregate job unknown until the scheduler reports it.
        self._partners: frozenset[str] | None = None
        self._joiners: frozenset[str] = frozenset()
        if isinstance(job, TrainJob):
            self._partners = frozenset({job.parameter_server.peer})
        self._inbox = ExecutorInbox(
            JobStamp(job_id=job.job_id, generation=job.generation),
            self.directory,
            self._arrivals,
            lambda: self._partners,
            context.allowance.max_file_bytes,
        )
        self._theta: tuple[int, int, str] | None = None
        self.slices: SlicePrefetcher | None = None
        if isinstance(job, TrainJob):
            self.slices = SlicePrefetcher(
                self._ask_scheduler,
                context.node.transfers.pull,
                context.cache,
                SliceDemand(
                    dataset=job.dataset,
                    incarnation=self.incarnation,
                    directory=self.directory.part("slices"),
                    stamp=self.stamp,
                    trace_of=self.signals.trace_of,
                    prefetch_s=context.config.cache.prefetch_s,
                ),
                ManifestCheck(context.node.request, job.dataset, job.manifest_hash),
            )
        self._fetches = 0
        #: a file of an executor may be as long as it likes, and the worker has some threads for all
        self._hashing = trio.CapacityLimiter(2)

    @property
    def job(self) -> Job:
        """As dispatched, with its secrets."""
        return self._job

    @property
    def kind(self) -> ExecutorClass:
        """Its class."""
        return "train" if isinstance(self._job, TrainJob) else "aggregate"

    def stamp(self) -> JobStamp:
        """Of what it sends now."""
        return JobStamp(
            job_id=self._job.job_id,
            generation=self.generation,
            round=self.round,
            attempt=self._attempt,
        )

    def begin(self) -> None:
        """The executor is about to start: from now on it is traced."""
        self._job = msgspec.structs.replace(self._job, traced=self.signals.begin())

    @contextmanager
    def accepting(self) -> Iterator[None]:
        """Take files from the job's other executors while the block lasts."""
        kind = "theta" if self.kind == "train" else "update"
        stop_accepting = self._context.node.transfers.accept(
            kind, self._job.job_id, self._gate, self._arrived
        )
        try:
            yield
        finally:
            stop_accepting()

    # --- from the scheduler and other executors -----------------------------------------------------------

    def steer(self, seq: int, directive: Directive) -> tuple[PeerRef, ...]:
        """Pass on a directive of the scheduler; an old one is ignored. Returns the peers whose addresses it
        names: there may be so many that learning them takes seconds.
        """
        if isinstance(directive, Rejoin):
            # before the executor receives it: it replies in the new generation
            self._rejoin(directive)
        if not self._directives.put(seq, directive):
            return ()
        self.signals.steered(directive)
        match directive:
            case Members(peers=peers):
                self._partners = frozenset(peer.peer for peer in peers)
                self._deliveries.keep_only("theta", self._partners | self._joiners)
                return peers
            case SendModel(to=to):
                self._joiners |= {to.peer}
                return (to,)
            case _:
                return ()

    def _rejoin(self, rejoin: Rejoin) -> None:
        if rejoin.generation <= self.generation:
            return
        logger.info("The job goes on in its generation %d.", rejoin.generation, extra=self.fields)
        self.generation = rejoin.generation
        self._inbox.begin_generation(rejoin.generation)
        if self.slices is None:
            return
        if rejoin.parameter_server is not None:
            self._partners = frozenset({rejoin.parameter_server.peer})
            self._deliveries.keep_only("update", self._partners)
            self._context.node.learn(rejoin.parameter_server)
        if rejoin.start_over:
            self.round, self._attempt, self._theta = rejoin.round, 0, None
            self.slices.start_over()
        else:
            self.slices.begin_generation()

    async def _ask_scheduler(self, request: Request) -> Response:
        return await self._context.node.request(self._job.scheduler, request)

    async def _gate(self, caller: str, meta: TransferMeta) -> Path:
        """As the inbox has it; what there is no space for ends the executor, so that the job goes on
        elsewhere: nobody else could report why nothing arrives here.
        """
        path = await self._inbox.gate(caller, meta)
        if (lack := lack_of_space(self.directory.path, meta.size)) is not None:
            if self._stop("its disk is full"):
                logger.error("%s of round %d: %s.", meta.kind, self.round, lack, extra=self.fields)
                self.outbox.put(self.stamp(), ExecutorError(kind="disk", message=lack))
            raise Refused("no-space", lack)
        return path

    async def _arrived(self, caller: str, meta: TransferMeta, path: Path) -> None:
        await self._inbox.arrived(caller, meta, path)
        if self.slices is None or meta.stamp is None:
            return
        self.signals.theta_arrived(meta.stamp.round, meta.size)
        before, self._theta = self._theta, (meta.stamp.round, meta.stamp.attempt, meta.blake3)
        self.round, self._attempt = meta.stamp.round, meta.stamp.attempt
        continued = meta.stamp.round == (before[0] + 1 if before else 0) and self._job.me in meta.contributors
        if before is not None and before != self._theta and not continued:
            self.slices.start_over()

    # --- from the executor, by its bridge -----------------------------------------------------------------

    async def fetch(self, resource: Reference) -> list[FetchedFile]:
        """Files of ``resource``, in a directory of their own; or the next slice."""
        if isinstance(resource, SchedulerData):
            return [await self._next_slice(resource)]
        scheduler = self._job.scheduler.peer
        if isinstance(resource, Peers) and any(one.peer != scheduler for one in resource.peers):
            # others would take this worker for one that asks for the job that it does for them
            raise Refused("uninvited", "an executor fetches files from the scheduler of its own job alone")
        self._fetches += 1
        number = self._fetches
        with self.directory.fetching(number) as directory:
            paths = await self._context.connectors.fetch(resource, directory, self._job.job_id)
            return [
                FetchedFile(
                    path=f"artifacts/{number}/{path.relative_to(directory).as_posix()}",
                    size=path.stat().st_size,
                )
                for path in paths
            ]

    async def _next_slice(self, resource: SchedulerData) -> FetchedFile:
        if self.slices is None or not isinstance(self._job, TrainJob):
            raise Refused("invalid", "only a training job has slices")
        if (resource.peer, resource.dataset) != (self._job.scheduler.peer, self._job.dataset):
            raise Refused("invalid", f"this job trains on {self._job.dataset!r} of its own scheduler")
        found = await self.slices.next()
        return FetchedFile(
            path=self.directory.relative(found.path),
            size=found.assigned.size,
            slice=found.assigned,
            round=found.stamp.round,
            attempt=found.stamp.attempt,
            generation=found.stamp.generation,
        )

    async def send(self, call: SendCall) -> Sent:
        """Send a file of the job directory to peers, or store it at a place that the owner allows."""
        directory = isinstance(call.resource, Local)
        if isinstance(call.resource, Local):
            # nothing is done for what is not allowed
            self._context.allowance.write_local(call.resource.url)
        # in threads: there may be many files
        pinned = self.directory.pinned(call.path, directory=directory)
        path = await in_thread(pinned.__enter__, limiter=FILES)
        try:
            return await self._send_pinned(call, path)
        finally:
            with trio.CancelScope(shield=True):
                await in_thread(pinned.__exit__, None, None, None, limiter=FILES)

    async def _send_pinned(self, call: SendCall, path: Path) -> Sent:
        resource = call.resource
        if isinstance(resource, Local):
            keeping = Keeping(call.marker, call.keep)
            await store_local(path, resource.url, self._context.allowance, keeping)
            return Sent(deliveries=(Delivery(peer=self._job.me, acknowledged=True),))
        if not isinstance(resource, Peers) or not resource.resource or not resource.peers:
            raise Refused("invalid", "files are sent to peers, under a resource's name, or to a local place")
        kind, _, prefix = resource.resource.partition("/")
        # each once, whatever the executor asks for
        receivers = tuple({receiver.peer: receiver for receiver in resource.peers}.values())
        self._check_receivers(kind, receivers)
        name = call.name or path.name
        if call.generation is not None and call.generation != self.generation:
            raise Refused("stale", f"generation {self.generation} of the job runs here now")
        stamp = JobStamp(
            job_id=self._job.job_id, generation=self.generation, round=call.round, attempt=call.attempt
        )
        try:
            async with self._hashing:
                sent = TransferMeta(
                    kind=kind,
                    name=f"{prefix}/{name}" if prefix else name,
                    size=0,
                    blake3=call.blake3,
                    stamp=stamp,
                    samples=call.samples,
                    contributors=call.contributors,
                    xxh3=call.xxh3,
                )
                meta = await with_hashes(path, sent)
        except OSError as exc:
            raise Refused("not-found", f"{call.path} cannot be read: {exc}") from exc
        return Sent(deliveries=await self._deliveries.deliver(path, meta, receivers, resource.strategy))

    def _check_receivers(self, kind: str, receivers: tuple[PeerRef, ...]) -> None:
        """An executor is somebody else's program: it sends nothing to those outside its job."""
        if kind in ("update", "theta"):
            allowed = (self._partners or frozenset()) | self._joiners
        elif kind in ("export", "checkpoint"):
            allowed = frozenset({self._job.scheduler.peer})
        else:
            raise Refused("invalid", f"there is no resource {kind!r} to send")
        for receiver in receivers:
            if receiver.peer not in allowed:
                raise Refused("uninvited", f"{receiver.peer} is not to receive {kind} of this job")

    def open_arrivals(self, kinds: frozenset[str]) -> AbstractContextManager[Feed[ReceivedFile]]:
        """For ``/resources/receive``."""
        return self._arrivals.open(kinds)

    def open_directives(self) -> AbstractContextManager[Feed[Directive]]:
        """For ``/directives``."""
        return self._directives.open()

    def take_spans(self, spans: tuple[FinishedSpan, ...]) -> None:
        """For ``/spans``."""
        self.signals.spans.take(spans)

    def report(self, event: Event) -> None:
        """Forward an event of the executor. Raises Refused (``busy``) when too many wait."""
        self.watch.sign(event, trio.current_time())
        if isinstance(event, Alive):
            return
        if not isinstance(event, Progress):
            self.outbox.check_space()
        self.signals.reported(event)
        round_ = getattr(event, "round", None)
        stamp = self.stamp()
        if isinstance(round_, int):
            stamp = JobStamp(job_id=stamp.job_id, generation=stamp.generation, round=round_)
        if isinstance(event, Progress):
            report = Report(stamp=stamp, incarnation=self.incarnation, progress=event)
            self._context.node.report(self._job.scheduler.peer, report)
            return
        if isinstance(event, RoundStarted) and self.slices is not None:
            self.slices.resume()
        self.outbox.put(stamp, event)
