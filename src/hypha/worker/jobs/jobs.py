"""Which job runs under which lease: answers schedulers, starts executors, stops them with their leases.

A dispatch may be repeated without harm. A newer generation of a job replaces an older one; what is sent
for another generation than the one that runs is refused as ``stale``.
"""

from __future__ import annotations

import logging

import trio

from hypha.config.models import ExecutorConfig
from hypha.errors import Refused
from hypha.messages import (
    Acknowledged,
    CancelJob,
    DispatchJob,
    ExecutorClass,
    ExecutorDescriptor,
    Rejoin,
    Steer,
    TrainJob,
)
from hypha.rules.leases import Bind, Drained, Hold, Lease
from hypha.tracing import untraced
from hypha.worker.jobs.execution import Execution
from hypha.worker.jobs.traffic import ExecutionContext
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.service import LeaseService

logger = logging.getLogger(__name__)

#: An executor that is being stopped may hold its resources for this long beyond the grace it is given.
KILL_MARGIN_S = 10.0
#: Peers whose addresses are learnt before others have their turn: some milliseconds.
_LEARNT_AT_ONCE = 64


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
