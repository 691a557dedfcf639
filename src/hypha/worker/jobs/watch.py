"""When an executor is taken for hung: alive as a process, but without a sign of life for too long.

A sign is any event on its bridge. An executor that has nothing to do (it waits for theta, a plan, data or
updates) sends :class:`Alive` while it waits, from the very thread that works otherwise; so a stopped process
and an endless batch look the same, and a long wait does not. Held to that are Hypha's own executors and those
whose owner gave them a ``hang_s``, from their start; any other from its first ``Alive`` on. Who never sends
it is not watched: what it owes its job is the business of the scheduler's deadlines. Calls and output are no
signs: a prefetching thread makes them beside a dead loop. Pure, but for the loop.
"""

from __future__ import annotations

import logging
import re

import trio

from hypha.config.models import ExecutorConfig, WorkerConfig
from hypha.messages import Alive, Event, Job, Loaded, ModelReady, TrainJob
from hypha.waiting import Reminder, in_words

logger = logging.getLogger(__name__)

#: until its model is there an executor has at least so long: importing torch alone may take a minute
LOADING_S = 300.0
#: this worker looks so often, at the least
_LONGEST_PAUSE_S = 5.0


class Watch:
    """One executor, started at ``now``: once its model is there, it may be silent for as long as the worker's
    owner says, or the job where that is less (0: for ever). :meth:`look` is to be called every
    :attr:`pause_s`.
    """

    def __init__(self, worker: WorkerConfig, executor: ExecutorConfig, job: Job, now: float) -> None:
        hang_s = worker.hang_s if executor.hang_s is None else executor.hang_s
        shorter_s = job.hang_s if isinstance(job, TrainJob) else None
        self._working_s = min(hang_s, shorter_s or hang_s)
        self._watched = executor.cmd is None or executor.hang_s is not None
        #: its model is not there yet
        self.loading = True
        self._last_at = self._looked_at = now
        self._last = ""
        #: what is to be reported of its end, once it was found to hang
        self.verdict = ""

    @property
    def pause_s(self) -> float:
        """Between two looks."""
        return min(_LONGEST_PAUSE_S, self._working_s / 10.0 or _LONGEST_PAUSE_S)

    def sign(self, event: Event, now: float) -> None:
        if isinstance(event, Alive):
            self._watched = True
        else:
            self._last = re.sub(r"(?<!^)(?=[A-Z])", " ", type(event).__name__).lower()
        if isinstance(event, Loaded | ModelReady):
            self.loading = False
        self._last_at = now

    def look(self, now: float) -> bool:
        slept_s = now - self._looked_at
        self._looked_at = now
        if slept_s > 3.0 * self.pause_s:
            # this worker itself stood still: signs may lie unread in its socket
            self._last_at += slept_s
        limit_s = max(self._working_s, LOADING_S) if self.loading else self._working_s
        silent_s = now - self._last_at
        if not self._watched or not self._working_s or silent_s < limit_s:
            return False
        last = f"; the last event it sent was {self._last!r}" if self._last else ""
        self.verdict = (
            f"it hung: no sign of life for {silent_s:.0f} s ({limit_s:g} are allowed), so it was killed{last}"
        )
        return True


async def keep_watch(watch: Watch, hung: trio.Event) -> None:
    """Set ``hung`` when it is. While it loads its model that is logged, as nothing else may be for long."""
    began, reminder = trio.current_time(), Reminder()
    while True:
        if watch.loading and reminder.due():
            lasted_s = trio.current_time() - began
            logger.info("The executor has been loading its model for %s.", in_words(lasted_s))
        if watch.look(trio.current_time()):
            hung.set()
            return
        await trio.sleep(watch.pause_s)
