"""Running a job: :func:`run_job`.

However a job ends, by success, error or cancellation, its workers are told and its leases given back
while the node still lives, within about four seconds; an open round is saved first, as it began.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path

import trio

from hypha.config.models import SchedulerConfig
from hypha.errors import HyphaError, JobFailed
from hypha.journal import JournalEntry
from hypha.net import open_node, options_from
from hypha.node import Node
from hypha.runtime import is_simulated
from hypha.scheduler.durable.state_directory import StateDirectory
from hypha.scheduler.job.running import RunningJob
from hypha.scheduler.job.states import JobContext, JobFiles, JobResult, Observation, Observer, Outcome
from hypha.scheduler.rounds.events import GenerationBegan, Record
from hypha.scheduler.status.recording import recording
from hypha.scheduler.status.snapshot import JobSnapshot
from hypha.telemetry.logs import logged
from hypha.telemetry.resources import watch_disks

#: how long the node outlives a cancellation, so that workers are told of its end
_SHELTER_S = 3.8


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
    and description is resumed, unless ``fresh``. Raises a :class:`HyphaError` whose ``exit_code`` says what
    went wrong.
    """
    job, observation = config.scheduler.job, observation or Observation()
    files = await JobFiles.checked(job)
    opened = open_ or partial(open_node, options_from(config, "hypha-scheduler"))
    outcome: Outcome = None
    journal, present = observation.journal, _Present()
    journal.listeners.append(present.listen)
    with (
        StateDirectory(config.state_dir, job.name) as state,
        logged(job_id=present.job_id, round=present.round),
    ):
        async with recording(config, journal) as feeding, _farewell() as (work, shelter):
            observe = _all(observation.observe, None if feeding is None else feeding.see)
            with shelter:
                async with opened() as node, _watched(config.state_dir):
                    task_status.started(node)
                    # raised only outside the nurseries, or it would arrive in an exception group
                    try:
                        with work:
                            context = JobContext.create(job, node, state, files, observation)
                            outcome = await RunningJob(context, observe).run(fresh)
                    except HyphaError as exc:
                        outcome = exc
    await trio.lowlevel.checkpoint_if_cancelled()
    if isinstance(outcome, JobResult):
        return outcome
    raise outcome or JobFailed("the job ended without a result")


def _watched(state_dir: Path) -> AbstractAsyncContextManager[None]:
    """The free space of the state directory is shown meanwhile."""
    return nullcontext() if is_simulated() else watch_disks({"state_dir": [state_dir]})


class _Present:
    """Which job it is and which round is open, for log entries: as the round machine decides."""

    def __init__(self) -> None:
        self._job_id: str | None = None
        self._round: int | None = None

    def job_id(self) -> str | None:
        """``None`` before it is known."""
        return self._job_id

    def round(self) -> int | None:
        """Counted from 0."""
        return self._round

    def listen(self, entry: JournalEntry) -> None:
        """One entry of the journal."""
        if isinstance(entry.event, GenerationBegan):
            self._job_id, self._round = entry.event.start.job_id, entry.event.start.round
        for action in entry.actions:
            if isinstance(action, Record) and action.tracker is not None:
                self._round = action.entry.round + 1


def _all(*observers: Observer | None) -> Observer | None:
    """One that calls all there are."""
    found = [one for one in observers if one is not None]

    def observe(snapshot: JobSnapshot) -> None:
        for one in found:
            one(snapshot)

    return observe if found else None


@asynccontextmanager
async def _farewell() -> AsyncIterator[tuple[trio.CancelScope, trio.CancelScope]]:
    """Two scopes: when this is cancelled, the first is too, and the second, shielded, only a little later:
    the node has to live long enough so that workers are told of its end.
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
