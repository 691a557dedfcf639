"""What others see of a running job: snapshots, metrics, traces, and a log line when it stands still."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import trio

from hypha.runtime import is_simulated
from hypha.scheduler.goodput.signals import GoodputSignals
from hypha.scheduler.job.states import JobContext, JobResult, JobStage, Observer, Outcome
from hypha.scheduler.status.signals import JobMetrics
from hypha.scheduler.status.snapshot import JobSnapshot
from hypha.scheduler.status.versions import ServiceVersions
from hypha.scheduler.status.view import Awaiting, awaited, sentence, snapshot_of

_OBSERVE_S = 0.2


class JobObserver:
    """Of one run; ``stage`` and ``outcome`` give the present ones. ``observe`` is called a few times a second
    while :meth:`run` runs.
    """

    def __init__(
        self,
        context: JobContext,
        observe: Observer | None,
        stage: Callable[[], JobStage],
        outcome: Callable[[], Outcome],
    ) -> None:
        self._context = context
        self._observe = observe
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
        self._goodput = GoodputSignals(context.journal, context.config.resources.num_workers, context.began)
        self._awaiting = Awaiting()
        self._services = ServiceVersions()

    @contextlib.contextmanager
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
            with self._metrics.shown(lambda: self.snapshot().state):
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

    def resume(self) -> None:
        """The rounds of an earlier scheduler of the job are in the progress now."""
        self._goodput.resume(self._context.progressed.rounds)

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
        if self._observe is not None:
            self._observe(self.snapshot())
        else:
            # metrics are wanted nevertheless
            self._goodput.report(trio.current_time())

    def snapshot(self) -> JobSnapshot:
        """The job as it is now."""
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
