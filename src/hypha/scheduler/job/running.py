"""A run of a job through its states: :class:`Preparing`, :class:`Opened`, :class:`WorkingJob`.

What ends a job comes out as one :class:`HyphaError` with its exit code; what its machines did last is left
beside the ledger then.
"""

from __future__ import annotations

import logging
import sys

import trio

from hypha.errors import HyphaError, JobFailed
from hypha.journal import write_entries
from hypha.runtime import in_thread
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.job.observing import JobObserver
from hypha.scheduler.job.opening import open_job, take_up
from hypha.scheduler.job.states import JobContext, JobResult, Observer, Opened, Outcome, Preparing
from hypha.scheduler.job.working import WorkingJob

logger = logging.getLogger(__name__)

#: SIGTERM to exit is promised within 5 s; this is our part
_SAVE_S = 1.8
_FAREWELL_S = 0.8
_RELEASE_S = 0.8


class RunningJob:
    """One run of a job; :meth:`run` once."""

    def __init__(self, context: JobContext, observe: Observer | None) -> None:
        self._context = context
        self._stage: Preparing | Opened | WorkingJob = Preparing("starting")
        self._outcome: Outcome = None
        self._observer = JobObserver(context, observe, lambda: self._stage, lambda: self._outcome)
        self._scope = trio.CancelScope()

    async def run(self, fresh: bool) -> JobResult:
        """To the end; raises what ended it."""
        with self._observer.shown():
            return await self._run(fresh)

    async def _run(self, fresh: bool) -> JobResult:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._observer.run)
                    self._stage = opened = await open_job(self._context, fresh, nursery, self._enter)
                    await take_up(self._context, opened, fresh)
                    self._observer.resume()
                    self._stage = working = WorkingJob(self._context, opened, nursery, self._end)
                    await working.run()
        except* HyphaError as group:
            self._outcome = _first(group)
        finally:
            with trio.CancelScope(shield=True):
                await self._leave()
            self._observer.close()
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
    for exc in group.exceptions:
        return _first(exc) if isinstance(exc, BaseExceptionGroup) else exc
    raise JobFailed("an empty group of errors")
