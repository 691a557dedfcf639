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
    Rejoin,
    Steer,
    TrainJob,
)
from hypha.rules.leases import Lease
from hypha.tracing import untraced
from hypha.worker.jobs.execution import Execution
from hypha.worker.jobs.traffic import ExecutionContext
from hypha.worker.leasing.service import LeaseService

logger = logging.getLogger(__name__)

#: An executor that is being stopped may hold its resources for this long beyond the grace it is given.
KILL_MARGIN_S = 10.0
#: Peers whose addresses are learnt before others have their turn: some milliseconds.
_LEARNT_AT_ONCE = 64


class Jobs:
    """The jobs of one worker, at most one executor for each job and class at a time.

    Executors run in ``nursery``. ``lease_service`` is set before anything is answered.
    """

    def __init__(self, context: ExecutionContext, nursery: trio.Nursery) -> None:
        self._context = context
        self._nursery = nursery
        self._executions: dict[tuple[str, ExecutorClass], Execution] = {}
        self.lease_service: LeaseService | None = None

    def answer(self) -> None:
        """Let schedulers ask."""
        self._context.node.answer(DispatchJob, self._dispatch)
        self._context.node.answer(CancelJob, self._cancel)
        self._context.node.answer(Steer, self._steer)
        self._context.node.health_details.append(self._health)

    def lease_ended(self, lease: Lease) -> None:
        """Stop what runs under ``lease``; never blocks."""
        for key, execution in list(self._executions.items()):
            if execution.lease.lease_id == lease.lease_id:
                execution.lease_ended()
                if execution.ended.is_set():
                    del self._executions[key]

    def running(self, kind: ExecutorClass) -> int:
        """How many executors of ``kind`` have not ended."""
        return sum(one.kind == kind and not one.ended.is_set() for one in self._executions.values())

    def _health(self) -> dict[str, str]:
        # not their ids: anybody may ask, and who knows the id of a job can take its place here
        kinds = [one.kind for one in self._executions.values() if not one.ended.is_set()]
        return {"jobs": ", ".join(sorted(kinds)) or "none"}

    async def _dispatch(self, caller: str, request: DispatchJob) -> Acknowledged:
        job = request.job
        kind: ExecutorClass = "train" if isinstance(job, TrainJob) else "aggregate"
        lease_service = self._lease_service()
        lease = lease_service.lease_for_dispatch(request.lease_id, caller, kind)
        if job.scheduler.peer != caller or job.me != self._context.node.peer_id:
            raise Refused("invalid", "the job names another scheduler or another worker")
        executor = self._executor_for(kind, job.executor.name, job.executor.kind, lease)
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
        lease_service.lease_for_dispatch(request.lease_id, caller, kind, job.job_id)
        lease_service.hold(lease.lease_id, self._context.config.stop_grace_s + KILL_MARGIN_S)
        self._context.node.learn(job.scheduler)
        execution = Execution(self._context, lease, job, executor, lease_service.gpus_of(lease.lease_id))
        self._executions[execution.key] = execution
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
            lease_id = execution.lease.lease_id
            live = [other for other in self._executions.values() if other.lease.lease_id == lease_id]
            if all(other.ended.is_set() for other in live):
                self._lease_service().drained(lease_id)
            known = {lease.lease_id for lease in self._lease_service().leases}
            if lease_id not in known and self._executions.get(execution.key) is execution:
                del self._executions[execution.key]

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

    def _executor_for(
        self, kind: ExecutorClass, name: str, wanted: ExecutorClass, lease: Lease
    ) -> ExecutorConfig:
        if wanted != kind or (lease.executor.kind, lease.executor.name) != (kind, name):
            raise Refused("lease", f"the lease is for executor {lease.executor.name!r}, not {name!r}")
        for executor in self._context.config.executors:
            if (executor.kind, executor.name) == (kind, name):
                return executor
        raise Refused("unsupported", f"no executor {name!r} for {kind} jobs here")

    def _lease_service(self) -> LeaseService:
        if self.lease_service is None:
            raise Refused("busy", "this worker is starting")
        return self.lease_service
