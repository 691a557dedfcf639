"""Running a job: :func:`run_job`.

However a job ends, by success, error or cancellation, its executors get a last directive and its leases are
given back while the node still lives, within about four seconds; an open round is saved first, as it began.
What ends a job comes out as one :class:`HyphaError` with its exit code; what its machines did last is left
beside the ledger then.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from functools import partial

import trio

from hypha.config.models import SchedulerConfig
from hypha.errors import HyphaError, JobFailed, leaves
from hypha.journal import write_entries
from hypha.net import open_node, options_from
from hypha.node import Node
from hypha.runtime import in_thread, is_simulated, outlasting
from hypha.scheduler.durable.export import output_for
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.durable.state_directory import StateDirectory
from hypha.scheduler.goodput.signals import GoodputSignals
from hypha.scheduler.handlers import served_directories
from hypha.scheduler.job.opening import Opened, open_job, take_up
from hypha.scheduler.job.states import JobContext, JobResult, JobStage, Observation, Observer, Outcome
from hypha.scheduler.job.working import WorkingJob
from hypha.scheduler.rounds.machine import RoundMachine
from hypha.scheduler.status.recording import recording
from hypha.scheduler.status.signals import JobMetrics
from hypha.scheduler.status.snapshot import JobSnapshot
from hypha.scheduler.status.versions import ServiceVersions
from hypha.scheduler.status.view import Awaiting, awaited, sentence, snapshot_of
from hypha.telemetry.logs import logged
from hypha.telemetry.resources import watch_disks

logger = logging.getLogger(__name__)

_OBSERVE_S = 0.2
#: how long the node outlives a cancellation, for the last directives to workers
_SHELTER_S = 3.8
#: SIGTERM to exit is promised within 5 s; this is our part
_SAVE_S = 1.8
_FAREWELL_S = 0.8
_RELEASE_S = 0.8


async def run_job(
    config: SchedulerConfig,
    observation: Observation | None = None,
    *,
    fresh: bool = False,
    open_: Callable[[], AbstractAsyncContextManager[Node]] | None = None,
    task_status: trio.TaskStatus[Node] = trio.TASK_STATUS_IGNORED,
) -> JobResult:
    """Run the job of ``config`` to its end, observed by ``observation``. ``task_status`` gets the node as
    soon as it listens; ``open_`` opens another node than one over libp2p. An unfinished job of the same name
    and description is resumed, unless ``fresh``. Raises a :class:`HyphaError` whose ``exit_code`` tells what
    went wrong.
    """
    job, observation = config.scheduler.job, observation or Observation()
    output = output_for(job.output, job.output_token)
    await in_thread(output.check)
    directories = await in_thread(served_directories, job)
    opened = open_ or partial(open_node, options_from(config, "hypha-scheduler"))
    disks: AbstractAsyncContextManager[None]
    disks = nullcontext() if is_simulated() else watch_disks({"state_dir": [config.state_dir]})
    outcome: Outcome = None
    running: RunningJob | None = None

    def present() -> RoundMachine | None:
        return None if running is None else running.machine

    with (
        StateDirectory(config.state_dir, job.name) as state,
        logged(
            job_id=lambda: None if (machine := present()) is None else machine.start.job_id,
            round=lambda: None if (machine := present()) is None else machine.round,
        ),
    ):
        async with (
            recording(config, observation.journal) as feeding,
            outlasting(_SHELTER_S) as (work, shelter),
        ):
            see = None if feeding is None else feeding.see
            observers = [one for one in (observation.observe, see) if one is not None]
            with shelter:
                async with opened() as node, disks:
                    task_status.started(node)
                    # raised only outside the nurseries, or it would arrive in an exception group
                    try:
                        with work:
                            context = JobContext(job, node, state, observation, output, directories)
                            running = RunningJob(context, observers)
                            outcome = await running.run(fresh)
                    except HyphaError as exc:
                        outcome = exc
    await trio.lowlevel.checkpoint_if_cancelled()
    if isinstance(outcome, JobResult):
        return outcome
    raise outcome or JobFailed("the job ended without a result")


class RunningJob:
    """One run of a job; :meth:`run` once. ``observers`` are called a few times a second meanwhile."""

    def __init__(self, context: JobContext, observers: list[Observer]) -> None:
        self._context = context
        self._observers = observers
        self._stage = JobStage("starting")
        self._opened: Opened | None = None
        self._outcome: Outcome = None
        self._scope = trio.CancelScope()
        self._metrics = JobMetrics(
            context.pool,
            context.progressed,
            context.config.rounds.update_rounds,
            context.began,
            lambda: self.machine,
            lambda: self._stage.dataset,
        )
        places, progressed = context.config.resources.num_workers, context.progressed
        self._goodput = GoodputSignals(
            context.journal, places, context.began, lambda: self.machine, progressed
        )
        self._awaiting = Awaiting()
        self._services = ServiceVersions()

    @property
    def machine(self) -> RoundMachine | None:
        return self._stage.machine

    async def run(self, fresh: bool) -> Outcome:
        """To the end: what the job has come to."""
        with nullcontext() if is_simulated() else self._shown():
            await self._run(fresh)
        return self._outcome

    async def _run(self, fresh: bool) -> None:
        context = self._context
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._observe)
                    self._opened = opened = await open_job(context, fresh, nursery, self._enter)
                    await take_up(context, opened, fresh)
                    self._stage = working = WorkingJob(context, opened, nursery, self._end)
                    await working.run()
        except* HyphaError as group:
            self._outcome = leaves(group)[0]
        finally:
            with trio.CancelScope(shield=True):
                await self._leave()
            self._look()
            self._goodput.close()

    def _enter(self, step: str) -> None:
        self._stage = JobStage(step)

    def _end(self, outcome: JobResult | HyphaError) -> None:
        self._outcome = self._outcome or outcome
        self._scope.cancel()

    @property
    def _failed(self) -> bool:
        """With an error of ours, or one that nobody foresaw; not by a cancellation."""
        return isinstance(self._outcome, HyphaError) or isinstance(sys.exception(), Exception)

    async def _leave(self) -> None:
        """Whatever was reached: the open round is saved, executors are finished, leases and the ledger
        closed.
        """
        stage, done = self._stage, isinstance(self._outcome, JobResult)
        if self._opened is None:
            # what an earlier scheduler left is as it was
            return
        if isinstance(stage, WorkingJob):
            if not done:
                await stage.save_last(_SAVE_S)
            await stage.executors.finish("done" if done else "the scheduler stops", _FAREWELL_S)
        await self._context.pool.close(_RELEASE_S)
        ledger = self._opened.ledger
        # on a full disk it would wait; then the next scheduler gives back what is over
        with trio.move_on_after(_RELEASE_S):
            await ledger.run(Ledger.lease_ended)
        ledger.close()
        if self._failed:
            await self._leave_journal()

    async def _leave_journal(self) -> None:
        """What the machines did last, for whoever wants to know why the job failed."""
        path = self._context.state.path / "journal.jsonl"
        entries = tuple(self._context.journal.entries)
        try:
            await in_thread(write_entries, path, self._snapshot(), entries)
        except OSError as exc:
            logger.warning("The journal of the failed job is not kept in %s: %s", path, exc)
        else:
            logger.info("What the scheduler decided last is in %s", path)

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Traces and metrics of this run, from what its machines note."""
        journal, traces = self._context.journal, self._context.traces
        listeners = (self._metrics.note, traces.note)
        # what they were made from was noted before anybody could listen
        for entry in journal.entries:
            self._metrics.note(entry)
        journal.listeners.extend(listeners)
        traces.begin(self._context.config.name)
        try:
            with self._metrics.shown(self._snapshot):
                yield
        finally:
            for listener in listeners:
                journal.leave(listener)
            traces.close()
            done = isinstance(self._outcome, JobResult)
            status = "done" if done else "failed" if self._failed else "stopped"
            self._metrics.ended(status, trio.current_time())

    async def _observe(self) -> None:
        """Look at the job until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._services.run, self._context.node)
            while True:
                self._look()
                self._look_for_silence()
                await trio.sleep(_OBSERVE_S)

    def _look(self) -> None:
        if not self._observers:
            # metrics are wanted nevertheless
            self._goodput.report(trio.current_time())
            return
        snapshot = self._snapshot()
        for observe in self._observers:
            observe(snapshot)

    def _snapshot(self) -> JobSnapshot:
        stage = self._stage
        data_nodes = {} if stage.dataset is None else stage.dataset.stated
        for peer, abilities in data_nodes.items():
            self._services.note("data node", peer, abilities)
        goodput = self._goodput.report(trio.current_time())
        services = self._services.snapshot(data_nodes)
        return snapshot_of(self._context, stage, self._outcome, goodput, services)

    def _look_for_silence(self) -> None:
        stage, context = self._stage, self._context
        machine = stage.machine
        if machine is None:
            # what stands behind the colon comes and goes while the step is the same
            self._awaiting.look(stage.step.partition(":")[0], lambda: stage.step)
            return

        def what() -> str:
            now = sentence(context.config, machine, context.pool, stage.dataset, "")
            whom = awaited(machine)
            return f"{now}; waiting for {whom}" if whom else now

        self._awaiting.look((machine.start.generation, machine.round, machine.phase), what)
