"""Running a job: :func:`run_job`, and its way through its states, :class:`Preparing`, :class:`Opened` and
:class:`WorkingJob`.

However a job ends, by success, error or cancellation, its executors get a last directive and its leases are
given back while the node still lives, within about four seconds; an open round is saved first, as it began.
What ends a job comes out as one :class:`HyphaError` with its exit code; what its machines did last is left
beside the ledger then.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from functools import partial

import trio

from hypha.config.models import SchedulerConfig
from hypha.errors import HyphaError, JobFailed
from hypha.journal import JournalEntry, write_entries
from hypha.net import open_node, options_from
from hypha.node import Node
from hypha.runtime import in_thread, is_simulated
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.durable.state_directory import StateDirectory
from hypha.scheduler.goodput.signals import GoodputSignals
from hypha.scheduler.job.opening import open_job, take_up
from hypha.scheduler.job.states import (
    JobContext,
    JobFiles,
    JobResult,
    JobStage,
    Observation,
    Observer,
    Opened,
    Outcome,
    Preparing,
)
from hypha.scheduler.job.working import WorkingJob
from hypha.scheduler.rounds.events import GenerationBegan, Record
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
    files = await JobFiles.checked(job)
    opened = open_ or partial(open_node, options_from(config, "hypha-scheduler"))
    disks: AbstractAsyncContextManager[None]
    disks = nullcontext() if is_simulated() else watch_disks({"state_dir": [config.state_dir]})
    outcome: Outcome = None
    journal, present = observation.journal, _Present()
    journal.listeners.append(present.listen)
    with (
        StateDirectory(config.state_dir, job.name) as state,
        logged(job_id=lambda: present.job_id, round=lambda: present.round),
    ):
        async with recording(config, journal) as feeding, _farewell() as (work, shelter):
            see = None if feeding is None else feeding.see
            observers = [one for one in (observation.observe, see) if one is not None]
            with shelter:
                async with opened() as node, disks:
                    task_status.started(node)
                    # raised only outside the nurseries, or it would arrive in an exception group
                    try:
                        with work:
                            context = JobContext.create(job, node, state, files, observation)
                            outcome = await RunningJob(context, observers).run(fresh)
                    except HyphaError as exc:
                        outcome = exc
    await trio.lowlevel.checkpoint_if_cancelled()
    if isinstance(outcome, JobResult):
        return outcome
    raise outcome or JobFailed("the job ended without a result")


class _Present:
    """Which job it is and which round is open, for log entries: as the round machine decides."""

    job_id: str | None = None
    round: int | None = None

    def listen(self, entry: JournalEntry) -> None:
        if isinstance(entry.event, GenerationBegan):
            self.job_id, self.round = entry.event.start.job_id, entry.event.start.round
        for action in entry.actions:
            if isinstance(action, Record):
                self.round = action.entry.round + 1


@asynccontextmanager
async def _farewell() -> AsyncIterator[tuple[trio.CancelScope, trio.CancelScope]]:
    """Two scopes: when this is cancelled, the first is too, and the second, shielded, only a little later:
    the node has to live until workers have their last directive.
    """
    work, shelter = trio.CancelScope(), trio.CancelScope(shield=True)

    async def pass_on() -> None:
        try:
            await trio.sleep_forever()
        finally:
            work.cancel()
            shelter.deadline = trio.current_time() + _SHELTER_S

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pass_on)
        yield work, shelter
        nursery.cancel_scope.cancel()


class JobObserver:
    """What others see of a run: snapshots, metrics, traces, and a log line when it stands still. ``stage``
    and ``outcome`` give the present ones. ``observers`` are called a few times a second while :meth:`run`
    runs.
    """

    def __init__(
        self,
        context: JobContext,
        observers: list[Observer],
        stage: Callable[[], JobStage],
        outcome: Callable[[], Outcome],
    ) -> None:
        self._context = context
        self._observers = observers
        self._stage = stage
        self._outcome = outcome
        self._metrics = JobMetrics(
            context.pool,
            context.progressed,
            context.config.rounds.update_rounds,
            context.began,
            lambda: stage().machine,
            lambda: stage().dataset,
        )
        places, progressed = context.config.resources.num_workers, context.progressed
        self._goodput = GoodputSignals(
            context.journal, places, context.began, lambda: stage().machine, progressed
        )
        self._awaiting = Awaiting()
        self._services = ServiceVersions()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Traces and metrics of this run, from what its machines note."""
        if is_simulated():
            yield
            return
        listeners = (self._metrics.note, self._context.traces.note)
        journal = self._context.journal
        # what they were made from was noted before anybody could listen
        for entry in journal.entries:
            self._metrics.note(entry)
        journal.listeners.extend(listeners)
        self._context.traces.begin(self._context.config.name)
        try:
            with self._metrics.shown(self.snapshot):
                yield
        finally:
            for listener in listeners:
                journal.leave(listener)
            self._context.traces.close()
            outcome = self._outcome()
            # an error that nobody foresaw is none of ours, but no cancellation either
            failed = outcome is not None or isinstance(sys.exception(), Exception)
            status = "done" if isinstance(outcome, JobResult) else "failed" if failed else "stopped"
            self._metrics.ended(status, trio.current_time())

    def close(self) -> None:
        """Look a last time; nothing is shown any more."""
        self._look()
        self._goodput.close()

    async def run(self) -> None:
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
        snapshot = self.snapshot()
        for observe in self._observers:
            observe(snapshot)

    def snapshot(self) -> JobSnapshot:
        stage = self._stage()
        data_nodes = {} if stage.dataset is None else stage.dataset.stated
        for peer, abilities in data_nodes.items():
            self._services.note("data node", peer, abilities)
        goodput = self._goodput.report(trio.current_time())
        return snapshot_of(
            self._context, stage, self._outcome(), goodput, self._services.snapshot(data_nodes)
        )

    def _look_for_silence(self) -> None:
        stage, context = self._stage(), self._context
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


class RunningJob:
    """One run of a job; :meth:`run` once."""

    def __init__(self, context: JobContext, observers: list[Observer]) -> None:
        self._context = context
        self._stage: Preparing | Opened | WorkingJob = Preparing("starting")
        self._outcome: Outcome = None
        self._observer = JobObserver(context, observers, lambda: self._stage, lambda: self._outcome)
        self._scope = trio.CancelScope()

    async def run(self, fresh: bool) -> Outcome:
        """To the end: what the job has come to."""
        with self._observer.shown():
            await self._run(fresh)
        return self._outcome

    async def _run(self, fresh: bool) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._observer.run)
                    self._stage = opened = await open_job(self._context, fresh, nursery, self._enter)
                    await take_up(self._context, opened, fresh)
                    self._stage = working = WorkingJob(self._context, opened, nursery, self._end)
                    await working.run()
        except* HyphaError as group:
            self._outcome = _first(group)
        finally:
            with trio.CancelScope(shield=True):
                await self._leave()
            self._observer.close()

    def _enter(self, step: str) -> None:
        self._stage = Preparing(step)

    def _end(self, outcome: JobResult | HyphaError) -> None:
        self._outcome = self._outcome or outcome
        self._scope.cancel()

    async def _leave(self) -> None:
        """Whatever was reached: the open round is saved, executors are finished, leases and the ledger
        closed.
        """
        stage, done = self._stage, isinstance(self._outcome, JobResult)
        if isinstance(stage, Preparing):
            # what an earlier scheduler left is as it was
            return
        if isinstance(stage, WorkingJob):
            if not done:
                await stage.save_last(_SAVE_S)
            await stage.finish("done" if done else "the scheduler stops", _FAREWELL_S)
        await self._context.pool.close(_RELEASE_S)
        # on a full disk it would wait; then the next scheduler gives back what is over
        with trio.move_on_after(_RELEASE_S):
            await stage.ledger.run(Ledger.lease_ended)
        stage.ledger.close()
        # an error of ours, or one that nobody foresaw; not a cancellation
        if isinstance(self._outcome, HyphaError) or isinstance(sys.exception(), Exception):
            await self._leave_journal()

    async def _leave_journal(self) -> None:
        """What the machines did last, for whoever wants to know why the job failed."""
        path = self._context.state.path / "journal.jsonl"
        entries = tuple(self._context.journal.entries)
        try:
            await in_thread(write_entries, path, self._observer.snapshot(), entries)
        except OSError as exc:
            logger.warning("The journal of the failed job is not kept in %s: %s", path, exc)
        else:
            logger.info("What the scheduler decided last is in %s", path)


def _first(group: BaseExceptionGroup[HyphaError]) -> HyphaError:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
