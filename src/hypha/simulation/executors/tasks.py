"""What threads are to an executor, as tasks of a simulated process: see :mod:`hypha.executor.threads`."""

from __future__ import annotations

from collections.abc import Callable

import trio

from hypha.executor.threads import ThreadCondition, Threads, Work
from hypha.node import Changes


class TaskCondition(ThreadCondition):
    """Needs no lock: a task is only ever interrupted where it waits."""

    def __init__(self) -> None:
        self._changes = Changes()

    def __enter__(self) -> bool:
        """There is nothing to lock."""
        return True

    def __exit__(self, *failure: object) -> None:
        """There is nothing to release."""

    def notify_all(self) -> None:
        self._changes.note()

    async def wait_for(  # type: ignore[override]
        self, holds: Callable[[], bool], timeout_s: float | None = None
    ) -> bool:
        with trio.move_on_after(float("inf") if timeout_s is None else timeout_s):
            while not holds():
                await self._changes.wait()
        return holds()


class Tasks(Threads):
    """In ``nursery``."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def condition(self) -> ThreadCondition:
        return TaskCondition()

    def start(self, name: str, work: Work, failed: Callable[[Exception], None]) -> None:
        async def run() -> None:
            try:
                await work()
            except Exception as exc:  # noqa: BLE001 - as at a thread's edge
                failed(exc)

        self._nursery.start_soon(run, name=name)

    def now(self) -> float:
        return trio.current_time()

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)
