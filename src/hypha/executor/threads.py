"""How an executor waits, and does several things at once: in threads of its own.

What waits is written as coroutines, so that the executors of a simulated world run the same code, as tasks
under its clock (:mod:`hypha.simulation.executors.tasks`). In an executor's process none is ever suspended:
each ``await`` blocks its thread, and :func:`finish` runs a coroutine to its end.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
Work = Callable[[], Coroutine[Any, Any, None]]


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """What ``coroutine`` returns or raises; this thread waits as long as it does."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise RuntimeError(f"{coroutine!r} waits for something that no thread of an executor can wait for")


class ThreadCondition(threading.Condition):
    """A lock, and what is waited for under it. Whoever changes that calls ``notify_all``, under the lock."""

    async def wait_for(  # type: ignore[override]
        self, holds: Callable[[], bool], timeout_s: float | None = None
    ) -> bool:
        """Wait, under the lock, until ``holds()``; False after ``timeout_s``."""
        return super().wait_for(holds, timeout_s)


class Threads:
    """Those of one executor."""

    def condition(self) -> ThreadCondition:
        return ThreadCondition()

    def start(self, name: str, work: Work, failed: Callable[[Exception], None]) -> None:
        """Do ``work`` beside whoever calls; ``failed`` is called with what it raises."""

        def run() -> None:
            try:
                finish(work())
            except Exception as exc:  # noqa: BLE001 - the thread's edge
                failed(exc)

        threading.Thread(target=run, name=name, daemon=True).start()

    def now(self) -> float:
        """Seconds of a monotonic clock."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - nothing else runs in this thread


class WorkQueue:
    """Does what it is given beside whoever gives it, in order, ``at_once`` pieces of work at the same time.
    ``failed`` is called with what one raises.
    """

    def __init__(
        self, threads: Threads, name: str, failed: Callable[[Exception], None], at_once: int = 1
    ) -> None:
        self._failed = failed
        self._changed = threads.condition()
        self._waiting: deque[Work] = deque()
        self._under_way = 0
        for _ in range(at_once):
            threads.start(name, self._run, failed)

    def put(self, work: Work) -> None:
        with self._changed:
            self._waiting.append(work)
            self._changed.notify_all()

    async def done(self, timeout_s: float) -> bool:
        """Wait until there is nothing more to do; False when it takes longer."""
        with self._changed:
            return await self._changed.wait_for(lambda: not self._waiting and not self._under_way, timeout_s)

    async def _run(self) -> None:
        while True:
            with self._changed:
                await self._changed.wait_for(lambda: bool(self._waiting))
                work = self._waiting.popleft()
                self._under_way += 1
            try:
                await work()
            except Exception as exc:  # noqa: BLE001 - the edge of what it was given
                self._failed(exc)
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()
