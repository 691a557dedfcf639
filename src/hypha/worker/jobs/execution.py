"""One executor from its dispatch to its end: its process, what confines and watches it, and its last reports.

It begins with a job that was dispatched and ends when the process has ended, the scheduler knows, and
nothing is left of it. Whoever wants it to stop sets :meth:`Execution.stop` and need not wait.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import trio

from hypha.config.environment import child_environment
from hypha.config.models import ExecutorConfig
from hypha.errors import HyphaError
from hypha.messages import ExecutorError, ExecutorExited, Job
from hypha.rules.leases import Lease
from hypha.runtime import in_thread
from hypha.telemetry.logs import bind
from hypha.waiting import log_waiting, reminded
from hypha.worker.bridge.server import BridgeHandlers, bind_bridge, serve_bridge
from hypha.worker.jobs.directory import FILES
from hypha.worker.jobs.traffic import ExecutionContext, ExecutorTraffic
from hypha.worker.jobs.watch import keep_watch
from hypha.worker.limits.gpus import GpuShare
from hypha.worker.limits.limits import Limits
from hypha.worker.limits.usage import Excess
from hypha.worker.processes.isolation import isolate
from hypha.worker.processes.keepers import Launch
from hypha.worker.processes.process import Exit, Supervision, prepare_launch, run_executor

logger = logging.getLogger(__name__)

#: How long the end of an executor is reported for: with its lease, and without.
FAREWELL_S, FAREWELL_WITHOUT_LEASE_S = 120.0, 10.0
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
        self._lease_over = trio.Event()
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
        self._lease_over.set()
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
                self.traffic.outbox.put(
                    self.traffic.stamp(),
                    ExecutorExited(
                        exit_code=ended.code, tail=ended.tail, incarnation=self.traffic.incarnation
                    ),
                )
                await self._farewell()
                nursery.cancel_scope.cancel()
        finally:
            self.ended.set()
            self.traffic.signals.close()
            if not kept:
                # an executor may have left any number of files
                with trio.CancelScope(shield=True):
                    await in_thread(self.traffic.directory.remove, limiter=FILES)

    async def _farewell(self) -> None:
        async def shorten(scope: trio.CancelScope) -> None:
            await self._lease_over.wait()
            scope.deadline = min(scope.deadline, trio.current_time() + FAREWELL_WITHOUT_LEASE_S)

        with trio.move_on_after(FAREWELL_S) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(shorten, scope)
                await self.traffic.outbox.wait_empty()
                self.reported.set()
                nursery.cancel_scope.cancel()
        if not self.reported.is_set():
            logger.warning("The executor's end could not be reported to the scheduler.")

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
        except (HyphaError, OSError) as exc:
            return Exit(
                code=NOT_STARTED, tail=f"the worker could not start the executor: {exc}", stopped=False
            )
        finally:
            if self._limits is not None:
                with trio.CancelScope(shield=True):
                    await self._limits.remove()

    async def _serve_process(self, launch: Launch, limits: Limits) -> Exit:
        kill = trio.Event()

        def exceeded(excess: Excess) -> None:
            # reported before the end is, so that the scheduler knows why there is one
            self.traffic.outbox.put(
                self.traffic.stamp(), ExecutorError(kind=excess.kind, message=excess.message)
            )
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
