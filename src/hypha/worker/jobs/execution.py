"""Which job runs under which lease, and each executor from its dispatch to its end: its process, what
confines and watches it, and its last reports.

A dispatch may be repeated without harm. A newer generation of a job replaces an older one; what is sent
for another generation than the one that runs is refused as ``stale``. An execution ends when the process has
ended, the scheduler knows, and nothing is left of it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import trio

from hypha.config.environment import child_environment
from hypha.config.models import ExecutorConfig
from hypha.errors import HyphaError, Refused
from hypha.messages import (
    Acknowledged,
    CancelJob,
    DispatchJob,
    ExecutorClass,
    ExecutorDescriptor,
    ExecutorError,
    ExecutorExited,
    Job,
    Rejoin,
    Steer,
    TrainJob,
)
from hypha.rules.leases import Bind, Drained, Hold, Lease
from hypha.runtime import in_thread
from hypha.telemetry.logs import bind
from hypha.tracing import untraced
from hypha.waiting import log_waiting, reminded
from hypha.worker.bridge.server import BridgeHandlers, bind_bridge, serve_bridge
from hypha.worker.jobs.directory import FILES
from hypha.worker.jobs.traffic import ExecutionContext, ExecutorTraffic
from hypha.worker.jobs.watch import keep_watch
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.service import LeaseService
from hypha.worker.limits.gpus import GpuShare
from hypha.worker.limits.limits import Limits
from hypha.worker.limits.usage import Excess
from hypha.worker.processes.isolation import isolate
from hypha.worker.processes.keepers import Launch
from hypha.worker.processes.process import Exit, Supervision, prepare_launch, run_executor

logger = logging.getLogger(__name__)

#: How long the end of an executor is reported for: with its lease, and without.
FAREWELL_S, FAREWELL_WITHOUT_LEASE_S = 120.0, 10.0
#: An executor that is being stopped may hold its resources for this long beyond the grace it is given.
KILL_MARGIN_S = 10.0
#: Peers whose addresses are learnt before others have their turn: some milliseconds.
_LEARNT_AT_ONCE = 64
#: The exit code reported for an executor that could not even be started.
NOT_STARTED = 126


async def run_process(
    handlers: BridgeHandlers,
    socket_path: Path,
    launch: Launch,
    stop: trio.Event,
    grace_s: float,
    kill: trio.Event,
    *,
    supervision: Supervision,
) -> Exit:
    """Run an executor as a process with its bridge at ``socket_path``. Raises OSError when there can be no
    socket.
    """
    listener = bind_bridge(socket_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_bridge, handlers, listener)
        ended = await run_executor(launch, stop, grace_s, kill=kill, supervision=supervision)
        nursery.cancel_scope.cancel()
    return ended


class Execution:
    """``job`` under ``lease``, run by ``executor`` on ``gpus``, by :meth:`run`."""

    def __init__(
        self, context: ExecutionContext, lease: Lease, job: Job, executor: ExecutorConfig, gpus: GpuShare
    ) -> None:
        self.lease = lease
        self.job_id, self.kind = job.job_id, job.executor.kind
        self._gpus = gpus
        self._limits: Limits | None = None
        self._context = context
        self._executor = executor
        self._stop = trio.Event()
        self._lease_over = False
        #: ends with the time in which its end is reported
        self._farewell = trio.CancelScope()
        self.ended = trio.Event()
        self.reported = trio.Event()
        #: what goes in and out
        self.traffic = ExecutorTraffic(context, lease, job, executor, self.stop)

    def stop(self, reason: str) -> bool:
        """End the executor; returns at once: False where it was to end anyway."""
        first = not self._stop.is_set()
        if first and not self.ended.is_set():
            logger.info("The executor is being stopped: %s.", reason, extra=self.traffic.fields)
        self._stop.set()
        return first

    def lease_ended(self) -> None:
        """Its lease is over, so the executor is stopped, and nobody waits long for a report."""
        self._lease_over = True
        without_s = trio.current_time() + FAREWELL_WITHOUT_LEASE_S
        self._farewell.deadline = min(self._farewell.deadline, without_s)
        self.stop("its lease ended")

    async def run(self, after: trio.Event | None = None) -> None:
        """Start when ``after`` is set, until it is over. Cancelled, it leaves no process and no directory."""
        bind(**self.traffic.fields, round=lambda: self.traffic.signals.round)
        kept = False
        try:
            if after is not None:
                waits = log_waiting(logger, "the end of the executor before this one", **self.traffic.fields)
                await reminded(after.wait, waits)
            self.traffic.begin()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.traffic.outbox.run)
                ended = await self._run_process()
                self.ended.set()
                self.traffic.signals.end(ended.code, ended.stopped)
                failed = ended.code != 0 and not ended.stopped
                logger.log(
                    logging.ERROR if failed else logging.INFO,
                    "The executor ended with exit code %d.%s",
                    ended.code,
                    f" Its last output:\n{ended.tail}" if failed else "",
                )
                # what filled the disk is no help there
                excess = None if self._limits is None else self._limits.excess
                full = excess is not None and excess.kind == "disk"
                if failed and self._context.config.keep_failed_jobs and not full:
                    path = await in_thread(self.traffic.directory.keep, ended.tail, limiter=FILES)
                    kept = True
                    logger.info("The failed executor's files are in %s.", path)
                incarnation = self.traffic.incarnation
                self.traffic.tell(
                    ExecutorExited(exit_code=ended.code, tail=ended.tail, incarnation=incarnation)
                )
                lasts_s = FAREWELL_WITHOUT_LEASE_S if self._lease_over else FAREWELL_S
                self._farewell.deadline = trio.current_time() + lasts_s
                with self._farewell:
                    await self.traffic.outbox.wait_empty()
                    self.reported.set()
                if not self.reported.is_set():
                    logger.warning("The executor's end could not be reported to the scheduler.")
                nursery.cancel_scope.cancel()
        finally:
            self.ended.set()
            self.traffic.signals.close()
            if not kept:
                # an executor may have left any number of files
                with trio.CancelScope(shield=True):
                    await in_thread(self.traffic.directory.remove, limiter=FILES)

    async def _run_process(self) -> Exit:
        try:
            limits = self._limits = Limits(
                self._context.means,
                self.traffic.incarnation,
                self.lease.resources,
                self._gpus,
                self.traffic.directory,
            )
            logger.info("Starting the executor. Limits: %s.", limits.description)
            environment = limits.environment(child_environment())
            launch = prepare_launch(self._executor, self.traffic.job, self.traffic.directory, environment)
            if self._executor.runtime == "bwrap":
                launch = isolate(launch, self._executor, self.traffic.directory, self._context.config)
            ended = await self._serve_process(limits.launch(launch), limits)
            if not (why := self.traffic.watch.verdict):
                limits.judge(ended.code != 0 and not ended.stopped)
                why = "" if limits.excess is None else limits.excess.message
            return replace(ended, tail=f"{why}\n{ended.tail}".rstrip()) if why else ended
        except* (HyphaError, OSError) as group:
            # nurseries wrap it
            cause: BaseException = group
        finally:
            if self._limits is not None:
                with trio.CancelScope(shield=True):
                    await self._limits.remove()
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        tail = f"the worker could not start the executor: {cause}"
        return Exit(code=NOT_STARTED, tail=tail, stopped=False)

    async def _serve_process(self, launch: Launch, limits: Limits) -> Exit:
        kill = trio.Event()

        def exceeded(excess: Excess) -> None:
            # reported before the end is, so that the scheduler knows why there is one
            self.traffic.tell(ExecutorError(kind=excess.kind, message=excess.message))
            kill.set()

        with self.traffic.accepting():
            async with trio.open_nursery() as nursery:
                if self.traffic.slices is not None:
                    nursery.start_soon(self.traffic.slices.run)
                nursery.start_soon(keep_watch, self.traffic.watch, kill)
                nursery.start_soon(limits.watch, exceeded)
                ended = await self._context.run_executor(
                    self.traffic,
                    self.traffic.directory.socket_path,
                    launch,
                    self._stop,
                    self._context.config.stop_grace_s,
                    kill,
                )
                nursery.cancel_scope.cancel()
        return ended


class Jobs:
    """The jobs of one worker, at most one executor for each job and class at a time.

    Executors run in ``nursery``, under leases about which ``arbiter`` decides.
    """

    def __init__(self, context: ExecutionContext, nursery: trio.Nursery, arbiter: Arbiter) -> None:
        self._context = context
        self._nursery = nursery
        self._executions: dict[tuple[str, ExecutorClass], Execution] = {}
        self.lease_service = LeaseService(arbiter, self._lease_ended, context.cache.datasets)

    def answer(self) -> None:
        self._context.node.answer(DispatchJob, self._dispatch)
        self._context.node.answer(CancelJob, self._cancel)
        self._context.node.answer(Steer, self._steer)
        self._context.node.health_details.append(self._health)

    def _lease_ended(self, lease: Lease) -> None:
        """Stop what runs under ``lease``; never blocks."""
        for key, execution in list(self._executions.items()):
            if execution.lease.lease_id == lease.lease_id:
                execution.lease_ended()
                if execution.ended.is_set():
                    del self._executions[key]

    def running(self) -> list[ExecutorClass]:
        """The classes of the executors that run now."""
        return [one.kind for one in self._executions.values() if not one.ended.is_set()]

    def _health(self) -> dict[str, str]:
        # not their ids: anybody may ask, and who knows the id of a job can take its place here
        return {"jobs": ", ".join(sorted(self.running())) or "none"}

    async def _dispatch(self, caller: str, request: DispatchJob) -> Acknowledged:
        job = request.job
        kind: ExecutorClass = "train" if isinstance(job, TrainJob) else "aggregate"
        lease_service = self.lease_service
        lease = lease_service.granted(Bind(request.lease_id, caller, kind))
        if job.scheduler.peer != caller or job.me != self._context.node.peer_id:
            raise Refused("invalid", "the job names another scheduler or another worker")
        executor = self._executor_for(job.executor, lease)
        self._context.allowance.check_job(job)
        running = self._executions.get((job.job_id, kind))
        if running is not None and running.lease.scheduler != caller:
            if not running.ended.is_set():
                raise Refused("lease", f"job {job.job_id} runs here for another scheduler")
            running = None
        if running is not None:
            if job.generation < running.traffic.generation:
                raise Refused("stale", f"generation {running.traffic.generation} of the job is here")
            same = (lease.lease_id, job.generation) == (running.lease.lease_id, running.traffic.generation)
            # Once the scheduler knows that it ended, the same dispatch again means: start it again. One that
            # names it means that in any case, and repeated it names one that is not here any more.
            known = running.reported.is_set() and not request.instead_of
            if same and not known and request.instead_of != running.traffic.incarnation:
                return Acknowledged()
        lease_service.granted(Bind(request.lease_id, caller, kind, job.job_id))
        lease_service.granted(Hold(lease.lease_id, self._context.config.stop_grace_s + KILL_MARGIN_S))
        self._context.node.learn(job.scheduler)
        execution = Execution(
            self._context, lease, job, executor, lease_service.arbiter.gpus.share_of(lease.lease_id)
        )
        self._executions[job.job_id, kind] = execution
        if running is not None:
            running.stop("its job is started anew")
        # it outlives this dispatch, and has a span of its own
        with untraced():
            self._nursery.start_soon(self._run, execution, running)
        logger.info(
            "Job dispatched.",
            extra={"job_id": job.job_id, "peer_id": caller, "lease_id": lease.lease_id, "kind": kind},
        )
        return Acknowledged()

    async def _run(self, execution: Execution, predecessor: Execution | None) -> None:
        try:
            await execution.run(after=predecessor.ended if predecessor is not None else None)
        except Exception:  # the edge: one broken job must not take the worker and its other jobs along
            logger.exception("A job failed.", extra={"job_id": execution.job_id})
        finally:
            lease_id, key = execution.lease.lease_id, (execution.job_id, execution.kind)
            live = [other for other in self._executions.values() if other.lease.lease_id == lease_id]
            if all(other.ended.is_set() for other in live):
                self.lease_service.handle(Drained(lease_id))
            known = {lease.lease_id for lease in self.lease_service.leases}
            if lease_id not in known and self._executions.get(key) is execution:
                del self._executions[key]

    async def _cancel(self, caller: str, request: CancelJob) -> Acknowledged:
        self._of(caller, request.job_id, request.kind).stop("its scheduler cancelled it")
        return Acknowledged()

    async def _steer(self, caller: str, request: Steer) -> Acknowledged:
        execution = self._of(caller, request.stamp.job_id, request.kind)
        begins = (
            isinstance(request.directive, Rejoin) and request.stamp.generation > execution.traffic.generation
        )
        if request.stamp.generation != execution.traffic.generation and not begins:
            raise Refused("stale", f"generation {execution.traffic.generation} of the job runs here")
        if execution.ended.is_set():
            raise Refused("not-found", f"the executor of job {request.stamp.job_id} has ended")
        for number, peer in enumerate(execution.traffic.steer(request.seq, request.directive), 1):
            self._context.node.learn(peer)
            if number % _LEARNT_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        return Acknowledged()

    def _of(self, caller: str, job_id: str, kind: ExecutorClass) -> Execution:
        execution = self._executions.get((job_id, kind))
        if execution is None:
            raise Refused("not-found", f"no {kind} executor of job {job_id} here")
        if execution.lease.scheduler != caller:
            raise Refused("lease", f"the {kind} executor of job {job_id} works for another scheduler")
        return execution

    def _executor_for(self, wanted: ExecutorDescriptor, lease: Lease) -> ExecutorConfig:
        if lease.executor != wanted:
            raise Refused("lease", f"the lease is for executor {lease.executor.name!r}, not {wanted.name!r}")
        for executor in self._context.config.executors:
            if (executor.kind, executor.name) == (wanted.kind, wanted.name):
                return executor
        raise Refused("unsupported", f"no executor {wanted.name!r} for {wanted.kind} jobs here")
