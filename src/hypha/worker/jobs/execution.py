"""One life of one executor: its directory, process, bridge and everything that goes in and out.

It begins with a job that was dispatched and ends when the process has ended, the scheduler knows, and
nothing is left of it. Whoever wants it to stop sets :meth:`Execution.stop` and need not wait.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import trio

from hypha.config.models import ExecutorConfig, WorkerConfig
from hypha.errors import HyphaError, Refused
from hypha.leases import Lease
from hypha.messages import (
    Alive,
    Delivery,
    Directive,
    Event,
    ExecutorClass,
    ExecutorError,
    ExecutorExited,
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
from hypha.net.bulk.transfers import meta_of
from hypha.node import Node
from hypha.runtime import in_thread, lack_of_space
from hypha.telemetry.logs import bind
from hypha.waiting import log_waiting, reminded
from hypha.worker.bridge.feeds import Directives, Feed, FileArrivals
from hypha.worker.bridge.outbox import Outbox
from hypha.worker.fetch.allowance import Allowance
from hypha.worker.fetch.connectors import Connectors
from hypha.worker.fetch.local import Keeping, store_local
from hypha.worker.jobs.deliveries import Deliveries
from hypha.worker.jobs.directory import JobDirectory
from hypha.worker.jobs.execution_signals import ExecutionSignals
from hypha.worker.jobs.inbox import ExecutorInbox
from hypha.worker.jobs.starting import EndSignals, ExecutorBackend
from hypha.worker.jobs.watch import Patience, Watch, keep_watch
from hypha.worker.limits.confining import Confined
from hypha.worker.limits.devices import GpuShare
from hypha.worker.limits.limits import Means
from hypha.worker.limits.usage import Excess
from hypha.worker.processes.isolation import isolate
from hypha.worker.processes.keepers import Launch
from hypha.worker.processes.process import Exit, prepare_launch
from hypha.worker.slices.cache import SliceCache
from hypha.worker.slices.manifest_check import ManifestCheck
from hypha.worker.slices.prefetching import SliceDemand, SlicePrefetcher

logger = logging.getLogger(__name__)

#: How long the end of an executor is reported for: with its lease, and without.
FAREWELL_S, FAREWELL_WITHOUT_LEASE_S = 120.0, 10.0
#: The exit code reported for an executor that could not even be started.
NOT_STARTED = 126
#: Threads that work on job directories: those of one job may take all of them, and no others of the worker.
_FILES = trio.CapacityLimiter(4)


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


class Execution:
    """``job`` under ``lease``, run by ``executor`` on ``gpus``. :meth:`run` is its life."""

    def __init__(
        self,
        context: ExecutionContext,
        lease: Lease,
        job: Job,
        executor: ExecutorConfig,
        gpus: GpuShare,
    ) -> None:
        self.lease = lease
        self._gpus = gpus
        self._confined: Confined | None = None
        self._job = job
        self._shop = context
        self._executor = executor
        #: of the job's current generation; the executor was started in an earlier one, if the job has
        #: rejoined
        self.generation = job.generation
        self._round = self._attempt = 0
        self._stop = trio.Event()
        self._watch = Watch(Patience.of(context.config, executor, job), trio.current_time())
        self._lease_over = trio.Event()
        self.ended = trio.Event()
        self.reported = trio.Event()
        self._directory = JobDirectory.create(context.config.work_dir)
        self.incarnation = self._directory.path.name
        self._signals = ExecutionSignals(job, self.kind, lease.lease_id, context.backend.emit_spans)
        self._directives = Directives()
        self._arrivals = FileArrivals(self._directory.path)
        self._outbox = Outbox(self._ask_scheduler, self.kind, self.incarnation)
        self._deliveries = Deliveries(context.node.transfers.send)
        # Who takes part; for an aggregate job unknown until the scheduler says so.
        self._partners: frozenset[str] | None = None
        self._joiners: frozenset[str] = frozenset()
        if isinstance(job, TrainJob):
            self._partners = frozenset({job.parameter_server.peer})
        self._inbox = ExecutorInbox(
            JobStamp(job_id=job.job_id, generation=job.generation),
            self._directory,
            self._arrivals,
            lambda: self._partners,
            context.allowance.max_file_bytes,
        )
        self._theta: tuple[int, int, str] | None = None
        self._slices: SlicePrefetcher | None = None
        if isinstance(job, TrainJob):
            self._slices = SlicePrefetcher(
                self._ask_scheduler,
                context.node.transfers.pull,
                context.cache,
                SliceDemand(
                    dataset=job.dataset,
                    incarnation=self.incarnation,
                    directory=self._directory.part("slices"),
                    stamp=self.stamp,
                    trace_of=self._signals.trace_of,
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

    @property
    def key(self) -> tuple[str, ExecutorClass]:
        """How the job's traffic is routed to it."""
        return (self._job.job_id, self.kind)

    def stamp(self) -> JobStamp:
        """Of what it says now."""
        return JobStamp(
            job_id=self._job.job_id,
            generation=self.generation,
            round=self._round,
            attempt=self._attempt,
        )

    @property
    def _fields(self) -> dict[str, str]:
        return {"job_id": self._job.job_id, "lease_id": self.lease.lease_id, "executor": self._executor.name}

    # --- told by the job manager ----------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """End the executor; returns at once."""
        if not self._stop.is_set() and not self.ended.is_set():
            logger.info("The executor is being stopped: %s.", reason, extra=self._fields)
        self._stop.set()

    def lease_ended(self) -> None:
        """Its lease is over, so the executor is stopped, and nobody waits long for a report."""
        self._lease_over.set()
        self.stop("its lease ended")

    def steer(self, seq: int, directive: Directive) -> tuple[PeerRef, ...]:
        """Pass on a directive of the scheduler; an old one is ignored. Returns the peers whose addresses it
        tells: there may be so many that learning them takes seconds.
        """
        if isinstance(directive, Rejoin):
            # before the executor hears of it: it answers in the new generation
            self._rejoin(directive)
        if not self._directives.put(seq, directive):
            return ()
        self._signals.steered(directive)
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
        logger.info("The job goes on in its generation %d.", rejoin.generation, extra=self._fields)
        self.generation = rejoin.generation
        self._inbox.begin_generation(rejoin.generation)
        if self._slices is None:
            return
        if rejoin.parameter_server is not None:
            self._partners = frozenset({rejoin.parameter_server.peer})
            self._deliveries.keep_only("update", self._partners)
            self._shop.node.learn(rejoin.parameter_server)
        if rejoin.start_over:
            self._round, self._attempt, self._theta = rejoin.round, 0, None
            self._slices.start_over()
        else:
            self._slices.begin_generation()

    async def _ask_scheduler(self, request: Request) -> Response:
        return await self._shop.node.request(self._job.scheduler, request)

    # --- its life -------------------------------------------------------------------------------------

    async def run(self, after: trio.Event | None = None) -> None:
        """Start when ``after`` is set; return when it is over. Cancelled, it leaves no process and no
        directory either.
        """
        bind(job_id=self._job.job_id, lease_id=self.lease.lease_id, round=lambda: self._round)
        kept = False
        try:
            if after is not None:
                waits = log_waiting(logger, "the end of the executor before this one", **self._fields)
                await reminded(after.wait, waits)
            self._job = msgspec.structs.replace(self._job, traced=self._signals.begin())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._outbox.run)
                ended = await self._run_process()
                self.ended.set()
                self._signals.end(ended.code, ended.stopped)
                failed = ended.code != 0 and not ended.stopped
                logger.log(
                    logging.ERROR if failed else logging.INFO,
                    "The executor ended with exit code %d.%s",
                    ended.code,
                    f" Its last output:\n{ended.tail}" if failed else "",
                    extra=self._fields,
                )
                # what filled the disk is no help there
                excess = None if self._confined is None else self._confined.excess
                full = excess is not None and excess.kind == "disk"
                if failed and self._shop.config.keep_failed_jobs and not full:
                    path = await in_thread(self._directory.keep, ended.tail, limiter=_FILES)
                    kept = True
                    logger.info("The failed executor's files are in %s.", path, extra=self._fields)
                self._outbox.put(
                    self.stamp(),
                    ExecutorExited(exit_code=ended.code, tail=ended.tail, incarnation=self.incarnation),
                )
                await self._farewell()
                nursery.cancel_scope.cancel()
        finally:
            self.ended.set()
            self._signals.close()
            if not kept:
                # an executor may have left any number of files
                with trio.CancelScope(shield=True):
                    await in_thread(self._directory.remove, limiter=_FILES)

    async def _farewell(self) -> None:
        async def shorten(scope: trio.CancelScope) -> None:
            await self._lease_over.wait()
            scope.deadline = min(scope.deadline, trio.current_time() + FAREWELL_WITHOUT_LEASE_S)

        with trio.move_on_after(FAREWELL_S) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(shorten, scope)
                await self._outbox.wait_empty()
                self.reported.set()
                nursery.cancel_scope.cancel()
        if not self.reported.is_set():
            logger.warning("The scheduler was not told of the executor's end.", extra=self._fields)

    async def _run_process(self) -> Exit:
        confined: Confined | None = None
        try:
            confined = self._confined = Confined(
                self._shop.means, self.incarnation, self.lease.resources, self._gpus, self._directory
            )
            logger.info("Starting the executor. Limits: %s.", confined.description, extra=self._fields)
            environment = confined.environment(self._shop.environment)
            launch = prepare_launch(self._executor, self._job, self._directory, environment)
            if self._executor.runtime == "bwrap":
                launch = isolate(launch, self._executor, self._directory, self._shop.config)
            ended = await self._serve_process(confined.launch(launch), confined)
            if not (why := self._watch.verdict):
                confined.judge(ended)
                why = "" if confined.excess is None else confined.excess.message
            return replace(ended, tail=f"{why}\n{ended.tail}".rstrip()) if why else ended
        except (HyphaError, OSError) as exc:
            return Exit(
                code=NOT_STARTED, tail=f"the worker could not start the executor: {exc}", stopped=False
            )
        finally:
            if confined is not None:
                with trio.CancelScope(shield=True):
                    await confined.remove()

    async def _serve_process(self, launch: Launch, confined: Confined) -> Exit:
        kind = "theta" if self.kind == "train" else "update"
        kill = trio.Event()

        def exceeded(excess: Excess) -> None:
            # said before the end is, so that the scheduler knows why there is one
            self._outbox.put(self.stamp(), ExecutorError(kind=excess.kind, message=excess.message))
            kill.set()

        stop_accepting = self._shop.node.transfers.accept(kind, self._job.job_id, self._gate, self._arrived)
        try:
            async with trio.open_nursery() as nursery:
                if self._slices is not None:
                    nursery.start_soon(self._slices.run)
                nursery.start_soon(keep_watch, self._watch, kill)
                nursery.start_soon(confined.watch, exceeded)
                ended = await self._shop.backend.run(
                    self,
                    self._directory.socket_path,
                    replace(launch, output_fields=lambda: self._signals.fields),
                    EndSignals(self._stop, self._shop.config.stop_grace_s, kill),
                )
                nursery.cancel_scope.cancel()
                return ended
        finally:
            stop_accepting()

    async def _gate(self, caller: str, meta: TransferMeta) -> Path:
        """As the inbox has it; what there is no room for ends the executor, so that the job goes on
        elsewhere: nobody else could say why nothing arrives here.
        """
        path = await self._inbox.gate(caller, meta)
        if (lack := lack_of_space(self._directory.path, meta.size)) is not None:
            if not self._stop.is_set():
                logger.error("%s of round %d: %s.", meta.kind, self._round, lack, extra=self._fields)
                self._outbox.put(self.stamp(), ExecutorError(kind="disk", message=lack))
                self.stop("its disk is full")
            raise Refused("no-space", lack)
        return path

    async def _arrived(self, caller: str, meta: TransferMeta, path: Path) -> None:
        await self._inbox.arrived(caller, meta, path)
        if self._slices is None or meta.stamp is None:
            return
        self._signals.theta_arrived(meta.stamp.round, meta.size)
        before, self._theta = self._theta, (meta.stamp.round, meta.stamp.attempt, meta.blake3)
        self._round, self._attempt = meta.stamp.round, meta.stamp.attempt
        continued = meta.stamp.round == (before[0] + 1 if before else 0) and self._job.me in meta.contributors
        if before is not None and before != self._theta and not continued:
            self._slices.start_over()

    # --- the bridge's desk ----------------------------------------------------------------------------

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
        with self._directory.fetching(number) as directory:
            paths = await self._shop.connectors.fetch(resource, directory, self._job.job_id)
            return [
                FetchedFile(
                    path=f"artifacts/{number}/{path.relative_to(directory).as_posix()}",
                    size=path.stat().st_size,
                )
                for path in paths
            ]

    async def _next_slice(self, resource: SchedulerData) -> FetchedFile:
        if self._slices is None or not isinstance(self._job, TrainJob):
            raise Refused("invalid", "only a training job has slices")
        if (resource.peer, resource.dataset) != (self._job.scheduler.peer, self._job.dataset):
            raise Refused("invalid", f"this job trains on {self._job.dataset!r} of its own scheduler")
        found = await self._slices.next()
        return FetchedFile(
            path=self._directory.relative(found.path),
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
            self._shop.allowance.write_local(call.resource.url)
        # in threads: there may be many files
        pinned = self._directory.pinned(call.path, directory=directory)
        path = await in_thread(pinned.__enter__, limiter=_FILES)
        try:
            return await self._send_pinned(call, path)
        finally:
            with trio.CancelScope(shield=True):
                await in_thread(pinned.__exit__, None, None, None, limiter=_FILES)

    async def _send_pinned(self, call: SendCall, path: Path) -> Sent:
        resource = call.resource
        if isinstance(resource, Local):
            keeping = Keeping(call.marker, call.keep)
            await store_local(path, resource.url, self._shop.allowance, keeping)
            return Sent(deliveries=(Delivery(peer=self._job.me, acknowledged=True),))
        if not isinstance(resource, Peers) or not resource.resource or not resource.peers:
            raise Refused("invalid", "files are sent to peers, under a resource's name, or to a local place")
        kind, _, prefix = resource.resource.partition("/")
        # each once, whatever the executor says
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
                meta = await meta_of(
                    path,
                    kind,
                    f"{prefix}/{name}" if prefix else name,
                    stamp=stamp,
                    samples=call.samples,
                    contributors=call.contributors,
                    blake3=call.blake3,
                    xxh3=call.xxh3,
                )
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
        self._signals.spans.take(spans)

    def say(self, event: Event) -> None:
        """Forward an event of the executor. Raises Refused (``busy``) when too many wait."""
        self._watch.sign(event, trio.current_time())
        if isinstance(event, Alive):
            return
        if not isinstance(event, Progress):
            self._outbox.check_space()
        self._signals.said(event)
        round_ = getattr(event, "round", None)
        stamp = self.stamp()
        if isinstance(round_, int):
            stamp = JobStamp(job_id=stamp.job_id, generation=stamp.generation, round=round_)
        if isinstance(event, Progress):
            report = Report(stamp=stamp, incarnation=self.incarnation, progress=event)
            self._shop.node.report(self._job.scheduler.peer, report)
            return
        if isinstance(event, RoundStarted) and self._slices is not None:
            self._slices.resume()
        self._outbox.put(stamp, event)
