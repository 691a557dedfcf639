"""Everything that goes into and out of one executor: its bridge's requests, files, directives and events.

What the executor asks for is judged here: it is somebody else's program, and reaches nobody outside its job.
So is what others send to it. A file lands in ``incoming/``, once it is whole, under a name made of its round,
hash and sender: two files never share one, and a transfer that was cut is resumed where it was. One that
still waits for the executor is not taken twice; one that it has worked off is, since what a repetition means
is for the executor to decide.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
    ExecutorError,
    FetchedFile,
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
from hypha.runtime import lack_of_space
from hypha.worker.bridge.feeds import Directives, FileArrivals
from hypha.worker.bridge.outbox import Outbox
from hypha.worker.bridge.server import BridgeHandlers
from hypha.worker.bridge.spans import EmitSpans, ExecutorSpans
from hypha.worker.fetch.allowance import Allowance
from hypha.worker.fetch.connectors import Connectors
from hypha.worker.fetch.local import store_local
from hypha.worker.jobs.deliveries import Deliveries, settled, turn_of
from hypha.worker.jobs.directory import JobDirectory
from hypha.worker.jobs.execution_signals import ExecutionSignals
from hypha.worker.jobs.watch import Watch
from hypha.worker.limits.limits import Means
from hypha.worker.processes.keepers import Launch
from hypha.worker.processes.process import Exit, secrets_of
from hypha.worker.slices.cache import SliceCache
from hypha.worker.slices.manifest_check import ManifestCheck
from hypha.worker.slices.prefetching import SliceDemand, SlicePrefetcher

logger = logging.getLogger(__name__)

#: Files of one sender that the executor has not deleted yet; more are ``busy``.
MAX_WAITING = 8

#: ``await run(handlers, socket path, launch, stop, grace_s, kill)`` runs one executor, which may ask the
#: handlers, until it has ended: politely once ``stop`` is set, within ``grace_s``; at once with ``kill``.
#: Cancelled, nothing of it is left.
RunExecutor = Callable[[BridgeHandlers, Path, Launch, trio.Event, float, trio.Event], Awaitable[Exit]]


@dataclass(frozen=True)
class ExecutionContext:
    """What all executors of a worker share. ``run_executor`` runs each, ``emit_spans`` exports their spans;
    without, they are not asked for any.
    """

    node: Node
    config: WorkerConfig
    cache: SliceCache
    allowance: Allowance
    connectors: Connectors
    means: Means
    run_executor: RunExecutor
    emit_spans: EmitSpans | None = None


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
        #: as dispatched, with its secrets
        self.job = job
        self.kind = job.executor.kind
        self._stop = stop
        #: of the job's current generation; the executor was started in an earlier one, if the job has
        #: rejoined
        self.generation = job.generation
        self.round = self._attempt = 0
        self.directory = JobDirectory.create(context.config.work_dir)
        self.incarnation = self.directory.path.name
        self.fields = {"job_id": job.job_id, "lease_id": lease.lease_id, "executor": executor.name}
        self.watch = Watch(context.config, executor, job, trio.current_time())
        self.signals = ExecutionSignals(job, lease.lease_id, emits=context.emit_spans is not None)
        self.spans = ExecutorSpans(context.emit_spans, job.job_id, secrets_of(job))
        ask = partial(context.node.request, job.scheduler)
        self.outbox = Outbox(ask, self.kind, self.incarnation)
        self.directives = Directives()
        self.arrivals = FileArrivals(self.directory.path)
        self._deliveries = Deliveries(context.node.transfers)
        # Who takes part; for an aggregate job unknown until the scheduler reports it.
        self._partners: frozenset[str] | None = None
        self._joiners: frozenset[str] = frozenset()
        if isinstance(job, TrainJob):
            self._partners = frozenset({job.parameter_server.peer})
        #: of what arrived, by sender
        self._newest: dict[str, tuple[int, int, int]] = {}
        #: files of an earlier generation of the job
        self._refused = 0
        self._theta: tuple[int, int, str] | None = None
        self.slices: SlicePrefetcher | None = None
        if isinstance(job, TrainJob):
            self.slices = SlicePrefetcher(
                ask,
                context.node.transfers,
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
        #: a file of an executor may be as long as it likes, and the worker has some threads for all
        self._hashing = trio.CapacityLimiter(2)

    def stamp(self) -> JobStamp:
        """Of what it sends now."""
        return JobStamp(
            job_id=self.job.job_id, generation=self.generation, round=self.round, attempt=self._attempt
        )

    def tell(self, event: Event) -> None:
        """Have the scheduler told of the executor what this worker knows."""
        self.outbox.put(self.stamp(), event)

    def begin(self) -> None:
        """The executor is about to start: from now on it is traced."""
        self.job = msgspec.structs.replace(self.job, traced=self.signals.begin())

    @contextmanager
    def accepting(self) -> Iterator[None]:
        """Take files from the job's other executors while the block lasts."""
        kind = "theta" if self.kind == "train" else "update"
        stop_accepting = self._context.node.transfers.accept(kind, self.job.job_id, self._gate, self._arrived)
        try:
            yield
        finally:
            stop_accepting()

    def steer(self, seq: int, directive: Directive) -> tuple[PeerRef, ...]:
        """Pass on a directive of the scheduler; an old one is ignored. Returns the peers whose addresses it
        names: there may be so many that learning them takes seconds.
        """
        if isinstance(directive, Rejoin):
            # before the executor receives it: it replies in the new generation
            self._rejoin(directive)
        if not self.directives.put(seq, directive):
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

    async def _gate(self, caller: str, meta: TransferMeta) -> Path:
        """Where the file goes; ``Refused`` when it may not come in. What there is no space for ends the
        executor, so that the job goes on elsewhere: nobody else could report why nothing arrives here.
        """
        stamp = self._fence(caller, meta)
        max_bytes = self._context.allowance.max_file_bytes
        if self._partners is None:
            raise Refused("busy", "this executor does not know yet who takes part")
        if caller not in self._partners:
            raise Refused("uninvited", f"{caller} may not send {meta.kind} to this executor")
        if meta.size > max_bytes:
            raise Refused("too-large", f"{meta.size} bytes, allowed are {max_bytes}")
        if not meta.checked.isalnum() or not meta.kind.isalnum():
            raise Refused("malformed", "kind and hash must be plain words")
        # theta of another attempt at the round has the same bytes and another meaning
        name = f"{meta.kind}-{stamp.generation}-{stamp.round}-{stamp.attempt}-{meta.checked[:32]}-{caller}"
        waiting = [file for file in self.arrivals.waiting() if file.from_peer == caller]
        if any(file.path == f"incoming/{name}" for file in waiting):
            raise Refused("duplicate", f"this {meta.kind} of round {stamp.round} is here already")
        if len(waiting) >= MAX_WAITING:
            raise Refused("busy", "earlier files are not worked off yet")
        if (lack := lack_of_space(self.directory.path, meta.size)) is not None:
            if self._stop("its disk is full"):
                logger.error("%s of round %d: %s.", meta.kind, self.round, lack, extra=self.fields)
                self.tell(ExecutorError(kind="disk", message=lack))
            raise Refused("no-space", lack)
        return self.directory.receiving(name)

    async def _arrived(self, caller: str, meta: TransferMeta, path: Path) -> None:
        """The file is whole, verified and durable, but not acknowledged yet; the executor gets it."""
        stamp = self._fence(caller, meta)
        delivered = self.directory.deliver(path)
        self._newest[caller] = turn_of(stamp)
        self.arrivals.put(ReceivedFile(path=delivered, size=meta.size, from_peer=caller, meta=meta))
        if self.slices is None:
            return
        self.signals.theta_arrived(stamp.round, meta.size)
        before, self._theta = self._theta, (stamp.round, stamp.attempt, meta.blake3)
        self.round, self._attempt = stamp.round, stamp.attempt
        continued = stamp.round == (before[0] + 1 if before else 0) and self.job.me in meta.contributors
        if before is not None and before != self._theta and not continued:
            self.slices.start_over()

    def _fence(self, caller: str, meta: TransferMeta) -> JobStamp:
        stamp = meta.stamp
        if stamp is None or stamp.job_id != self.job.job_id:
            raise Refused("malformed", "the file carries no stamp of this job")
        if stamp.generation < self.generation:
            self._refused += 1
            logger.warning(
                "A %s of generation %d, which is over, was refused (%d so far).",
                meta.kind,
                stamp.generation,
                self._refused,
                extra={"peer_id": caller, "job_id": stamp.job_id},
            )
            raise Refused("stale", f"generation {stamp.generation} is over")
        if stamp.generation > self.generation:
            raise Refused("busy", f"generation {stamp.generation} has not started here yet")
        # Per sender; another generation of the job may go back to the round of a checkpoint.
        newest = self._newest.get(caller)
        if newest is not None and turn_of(stamp) < newest:
            raise Refused("stale", f"you have sent {meta.kind} of round {newest[1]} already")
        return stamp

    async def fetch(self, resource: Reference) -> list[FetchedFile]:
        """Files of ``resource``, in a directory of their own; or the next slice."""
        if isinstance(resource, SchedulerData):
            if self.slices is None or not isinstance(self.job, TrainJob):
                raise Refused("invalid", "only a training job has slices")
            if (resource.peer, resource.dataset) != (self.job.scheduler.peer, self.job.dataset):
                raise Refused("invalid", f"this job trains on {self.job.dataset!r} of its own scheduler")
            return [await self.slices.next()]
        scheduler = self.job.scheduler.peer
        if isinstance(resource, Peers) and any(one.peer != scheduler for one in resource.peers):
            # others would take this worker for one that asks for the job that it does for them
            raise Refused("uninvited", "an executor fetches files from the scheduler of its own job alone")
        with self.directory.fetching() as directory:
            paths = await self._context.connectors.fetch(resource, directory, self.job.job_id)
            return [
                FetchedFile(
                    path=f"artifacts/{directory.name}/{path.relative_to(directory).as_posix()}",
                    size=path.stat().st_size,
                )
                for path in paths
            ]

    async def send(self, call: SendCall) -> Sent:
        """Send a file of the job directory to peers, or store it at a place that the owner allows."""
        resource = call.resource
        if isinstance(resource, Local):
            # nothing is done for what is not allowed
            self._context.allowance.write_local(resource.url)
        async with self.directory.pinned(call.path, directory=isinstance(resource, Local)) as path:
            if isinstance(resource, Local):
                await store_local(path, resource.url, self._context.allowance, call.marker, call.keep)
                return Sent(deliveries=(Delivery(peer=self.job.me, acknowledged=True),))
            if not isinstance(resource, Peers) or not resource.resource or not resource.peers:
                text = "files are sent to peers, under a resource's name, or to a local place"
                raise Refused("invalid", text)
            kind, _, prefix = resource.resource.partition("/")
            # each once, whatever the executor asks for
            receivers = tuple({receiver.peer: receiver for receiver in resource.peers}.values())
            # an executor is somebody else's program: it sends nothing to those outside its job
            if kind in ("update", "theta"):
                allowed = (self._partners or frozenset()) | self._joiners
            elif kind in ("export", "checkpoint"):
                allowed = frozenset({self.job.scheduler.peer})
            else:
                raise Refused("invalid", f"there is no resource {kind!r} to send")
            for receiver in receivers:
                if receiver.peer not in allowed:
                    raise Refused("uninvited", f"{receiver.peer} is not to receive {kind} of this job")
            name = call.name or path.name
            if call.generation is not None and call.generation != self.generation:
                raise Refused("stale", f"generation {self.generation} of the job runs here now")
            stamp = msgspec.structs.replace(self.stamp(), round=call.round, attempt=call.attempt)
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
            return settled(await self._deliveries.deliver(path, meta, receivers, resource.strategy))

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
            self._context.node.report(self.job.scheduler.peer, report)
            return
        if isinstance(event, RoundStarted) and self.slices is not None:
            self.slices.resume()
        self.outbox.put(stamp, event)
