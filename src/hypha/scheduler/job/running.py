"""A run of a job from its configuration to its published model, through its states: :class:`Preparing`,
:class:`Opened`, :class:`WorkingJob`.

What ends a job comes out as one :class:`HyphaError` with its exit code; what its machines did last is left
beside the ledger then.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

import trio

from hypha.config.models import JobConfig
from hypha.errors import HyphaError, JobFailed
from hypha.features import needs
from hypha.journal import Journal, write_entries
from hypha.messages import PeerRef
from hypha.node import Node
from hypha.runtime import in_thread, is_simulated
from hypha.scheduler.descriptions import searches_for
from hypha.scheduler.durable.export import Output
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.durable.replicas import Replicas
from hypha.scheduler.durable.starts import described
from hypha.scheduler.durable.state_directory import StateDirectory
from hypha.scheduler.goodput.signals import GoodputSignals
from hypha.scheduler.handlers import ServedDirectory
from hypha.scheduler.job.opening import Opened, Preparing, open_job, take_up
from hypha.scheduler.job.states import JobContext, JobResult
from hypha.scheduler.job.working import WorkingJob
from hypha.scheduler.leasing.events import SearchTimes
from hypha.scheduler.leasing.pool import Pool
from hypha.scheduler.rounds.policy import Rules
from hypha.scheduler.status.awaited import Awaiting, awaited
from hypha.scheduler.status.round_traces import RoundTraces
from hypha.scheduler.status.services import Services
from hypha.scheduler.status.signals import JobMetrics
from hypha.scheduler.status.snapshot import JobSnapshot
from hypha.scheduler.status.view import Progressed, sentence, snapshot_of, with_surroundings

logger = logging.getLogger(__name__)

_OBSERVE_S = 0.2
#: SIGTERM to exit is promised within 5 s; this is our part
_SAVE_S = 1.8
_FAREWELL_S = 0.8
_RELEASE_S = 0.8

Observer = Callable[[JobSnapshot], None]


class RunningJob:
    """One run of a job; :meth:`run` once. ``node`` is connected or will be."""

    def __init__(
        self,
        config: JobConfig,
        node: Node,
        state: StateDirectory,
        output: Output,
        directories: dict[str, ServedDirectory],
        observe: Observer | None,
        journal: Journal | None = None,
        trace_ratio: float | None = None,
    ) -> None:
        resources, journal = config.resources, journal or Journal()
        pace = SearchTimes(offer_deadline_s=resources.offer_deadline_s, yield_after_s=resources.yield_after_s)
        traces = RoundTraces(trace_ratio)
        train, aggregate = described(config, PeerRef(peer=""), "")
        asks = searches_for(
            resources,
            config.dataset.dataset,
            {"train": needs(train), "aggregate": needs(aggregate)},
            config.rounds.max_batch_size if config.rounds.batch_size is None else 1,
        )
        self._context = JobContext(
            config=config,
            rules=Rules.from_config(config),
            node=node,
            state=state,
            output=output,
            directories=directories,
            pool=Pool(node, asks, pace, journal=journal, traces=traces),
            replicas=Replicas(node, config.name),
            progressed=Progressed(),
            journal=journal,
            traces=traces,
            began=trio.current_time(),
        )
        self._metrics = JobMetrics(
            self._context.pool,
            self._context.progressed,
            config.rounds.update_rounds,
            self._context.began,
            lambda: self._stage.current.machine if isinstance(self._stage, WorkingJob) else None,
            lambda: None if isinstance(self._stage, Preparing) else self._stage.dataset,
        )
        self._goodput = GoodputSignals(journal, resources.num_workers, self._context.began)
        self._awaiting = Awaiting()
        self._services = Services()
        self._observe = observe
        self._stage: Preparing | Opened | WorkingJob = Preparing("starting")
        self._outcome: JobResult | HyphaError | None = None
        self._scope = trio.CancelScope()

    async def run(self, fresh: bool) -> JobResult:
        """To the end; raises what ended it."""
        with self._observed():
            return await self._run(fresh)

    @contextlib.contextmanager
    def _observed(self) -> Iterator[None]:
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
            with self._metrics.shown(lambda: self._snapshot().state):
                yield
        finally:
            for listener in listeners:
                journal.leave(listener)
            self._context.traces.close()
            outcome = self._outcome
            # an error that nobody foresaw is none of ours, but no cancellation either
            failed = outcome is not None or isinstance(sys.exception(), Exception)
            status = "done" if isinstance(outcome, JobResult) else "failed" if failed else "stopped"
            self._metrics.ended(status, trio.current_time())

    async def _run(self, fresh: bool) -> JobResult:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._observing)
                    nursery.start_soon(self._services.run, self._context.node)
                    self._stage = opened = await open_job(self._context, fresh, nursery, self._enter)
                    await take_up(self._context, opened, fresh)
                    self._goodput.resume(self._context.progressed.rounds)
                    self._stage = working = WorkingJob(self._context, opened, nursery, self._end)
                    await working.run()
        except* HyphaError as group:
            self._outcome = _first(group)
        finally:
            with trio.CancelScope(shield=True):
                await self._leave()
            self._look()
            self._goodput.close()
        if isinstance(self._outcome, JobResult):
            return self._outcome
        raise self._outcome or JobFailed("the job ended without a result")

    def _enter(self, stage: Preparing) -> None:
        self._stage = stage

    def _end(self, outcome: JobResult | HyphaError) -> None:
        self._outcome = self._outcome or outcome
        self._scope.cancel()

    async def _leave(self) -> None:
        """Whatever was reached: the open round is saved, executors are told, leases and the ledger closed."""
        stage, done = self._stage, isinstance(self._outcome, JobResult)
        if isinstance(stage, WorkingJob):
            if not done:
                await stage.save_last(_SAVE_S)
            await stage.finish("done" if done else "the scheduler stops", _FAREWELL_S)
        if isinstance(stage, Preparing):
            # what an earlier scheduler left is as it was
            return
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
            await in_thread(write_entries, path, self._snapshot(), entries)
        except OSError as exc:
            logger.warning("The journal of the failed job is not kept in %s: %s", path, exc)
        else:
            logger.info("What the scheduler decided last is in %s", path)

    def _snapshot(self) -> JobSnapshot:
        stage, outcome, context = self._stage, self._outcome, self._context
        now = trio.current_time()
        machine = stage.current.machine if isinstance(stage, WorkingJob) else None
        job = snapshot_of(
            context.config,
            machine,
            context.pool,
            None if isinstance(stage, Preparing) else stage.dataset,
            context.progressed,
            stage.step if isinstance(stage, Preparing) else "reading the job's state",
            outcome if isinstance(outcome, HyphaError) else None,
            outcome.output if isinstance(outcome, JobResult) else "",
            now - context.began,
            self._goodput.report(now),
        )
        stated = {} if isinstance(stage, Preparing) else stage.dataset.stated
        for peer, abilities in stated.items():
            self._services.note("data node", peer, abilities)
        services = self._services.snapshot(stated)
        return with_surroundings(job, machine, context.pool, context.node, now, services)

    def _look(self) -> None:
        if self._observe is not None:
            self._observe(self._snapshot())
        else:
            # metrics are wanted nevertheless
            self._goodput.report(trio.current_time())

    async def _observing(self) -> None:
        while True:
            self._look()
            self._look_for_silence()
            await trio.sleep(_OBSERVE_S)

    def _look_for_silence(self) -> None:
        stage, context = self._stage, self._context
        match stage:
            case Preparing(step=step):
                # what stands behind the colon comes and goes while the step is the same
                self._awaiting.look(step.partition(":")[0], lambda: step)
            case Opened():
                self._awaiting.look("opened", lambda: "reading the job's state")
            case WorkingJob(current=current, dataset=dataset):
                machine = current.machine

                def what() -> str:
                    now = sentence(context.config, machine, context.pool, dataset, "")
                    whom = awaited(machine)
                    return f"{now}; waiting for {whom}" if whom else now

                self._awaiting.look((machine.start.generation, machine.round, machine.phase), what)


def _first(group: BaseExceptionGroup[HyphaError]) -> HyphaError:
    for exc in group.exceptions:
        return _first(exc) if isinstance(exc, BaseExceptionGroup) else exc
    raise JobFailed("an empty group of errors")
