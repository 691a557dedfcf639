"""Processes of a simulated world: their tasks freeze together, and die together without another instruction.

A :class:`SimulatedProcess` owns every trio task that was started under its context variables. Each of these
tasks is stepped through a wrapper (:class:`Stepping`, a trio instrument, installs it) that stands between
trio and the task's own coroutine. While the process is frozen the wrapper keeps what a task would have been
resumed with, until it is thawed, as SIGSTOP and SIGCONT do. When the process is killed its coroutines are
never resumed again: no ``finally`` and no ``except`` runs, as with SIGKILL. They are kept, so that the
garbage collector does not run them either.

What several processes share (the network) must live outside of all of them.
"""

from __future__ import annotations

import contextvars
import inspect
import types
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator
from pathlib import Path
from random import Random
from typing import Any, TypeVar, TypeVarTuple

import trio
from outcome import Error, Outcome, Value
from trio._core import _run as trio_run
from trio._core._traps import WaitTaskRescheduled
from trio.lowlevel import Task

from hypha.runtime import Runtime, use_runtime

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_process: contextvars.ContextVar[SimulatedProcess | None] = contextvars.ContextVar("process", default=None)
#: coroutines of killed processes, until the real process ends: to collect them would run their ``finally``
_abandoned: list[Coroutine[Any, Any, Any]] = []


class ProcessGone(Exception):
    """The process that was to do something was killed."""


class _Killed(BaseException):
    """Wakes a task of a killed process; its coroutine never sees it."""


class SimulatedRuntime(Runtime):
    """Of one process: blocking calls run at once, chance is seeded, the disk is as full as the world says."""

    simulated = True

    def __init__(self, seed: int, wall_time: Callable[[], float], free_bytes: Callable[[Path], int]) -> None:
        self.random = Random(seed)
        self._wall_time = wall_time
        self._free_bytes = free_bytes
        #: what every blocking call takes, in seconds: a slow disk
        self.blocking_s = 0.0

    async def in_thread(
        self,
        call: Callable[[*Ts], T],
        *args: *Ts,
        limiter: trio.CapacityLimiter | None = None,
        abandon_on_cancel: bool = False,
    ) -> T:
        """Now, in the loop; a limiter still has its effect while the disk is slow."""
        holder = object()
        if limiter is not None:
            await limiter.acquire_on_behalf_of(holder)
        try:
            await trio.sleep(self.blocking_s)
            return call(*args)
        finally:
            if limiter is not None:
                limiter.release_on_behalf_of(holder)

    def check_cancelled(self) -> None:
        """Nothing can be cancelled meanwhile."""

    def free_bytes(self, directory: Path) -> int:
        return self._free_bytes(directory)

    def wall_time(self) -> float:
        return self._wall_time()


class Stepping(trio.abc.Instrument):
    """Puts the wrapper around each task of a process."""

    def task_spawned(self, task: Task) -> None:
        process = task.context.get(_process)
        if process is not None:
            task.coro = process._instead_of(task, task.coro)  # type: ignore[assignment]


class SimulatedProcess:
    """``name`` in messages; children die and freeze with their ``parent``. ``nursery`` is the world's.

    ``on_crash`` is called with what came out of a task that was started with :meth:`spawn`.
    """

    def __init__(
        self,
        name: str,
        runtime: Runtime,
        nursery: trio.Nursery,
        on_crash: Callable[[SimulatedProcess, BaseException], None],
        parent: SimulatedProcess | None = None,
    ) -> None:
        self.name = name
        self.runtime = runtime
        self.alive = True
        self.frozen = False
        self.nursery = nursery
        self._on_crash = on_crash
        self.parent = parent
        self._children: dict[SimulatedProcess, None] = {}
        self._tasks: dict[Task, None] = {}
        self._parked: list[Task] = []
        #: calls into this process that are under way: what ends each with an error
        self._serving: dict[object, Callable[[BaseException], None]] = {}
        #: called once when it is killed, or ends
        self.on_end: list[Callable[[], None]] = []
        if parent is not None:
            parent._children[self] = None
        with use_runtime(runtime):
            token = _process.set(self)
            self._context = contextvars.copy_context()
            _process.reset(token)

    def __repr__(self) -> str:
        return f"<{self.name}>"

    @property
    def children(self) -> int:
        return len(self._children)

    @property
    def tasks(self) -> Counter[str]:
        return Counter(task.name for task in self._tasks)

    def spawn(self, call: Callable[[*Ts], Awaitable[object]], *args: *Ts) -> None:
        """Start a task of this process; nothing when it is dead."""
        if self.alive:
            self._context.run(self.nursery.start_soon, self._guarded, call, args)

    async def _guarded(self, call: Callable[..., Awaitable[object]], args: tuple[object, ...]) -> None:
        try:
            await call(*args)
        except Exception as exc:  # noqa: BLE001 - the edge of a simulated process
            self.crashed(exc)

    async def call(self, call: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Have this process do it, as a task of its own, and return or raise what came of it. When the caller
        is cancelled, so is the task. Raises :class:`ProcessGone` when the process dies first.
        """
        if not self.alive:
            raise ProcessGone(self.name)
        done, scope = trio.Event(), trio.CancelScope()
        result: list[Outcome[T]] = []
        key = object()

        async def run() -> None:
            with scope:
                try:
                    result.append(Value(await call(*args)))
                except Exception as exc:  # noqa: BLE001 - handed to the caller
                    result.append(Error(exc))
            self._serving.pop(key, None)
            done.set()

        def give_up(exc: BaseException) -> None:
            result.append(Error(exc))
            done.set()

        self._serving[key] = give_up
        self._context.run(self.nursery.start_soon, run)
        caller = _process.get()
        if caller is not None:
            caller.on_end.append(scope.cancel)
        try:
            await done.wait()
        finally:
            scope.cancel()
            if caller is not None and scope.cancel in caller.on_end:
                caller.on_end.remove(scope.cancel)
        if not result:
            raise ProcessGone(f"{self.name} was told to stop")
        return result[0].unwrap()

    def crashed(self, exc: BaseException) -> None:
        """Something came out that should not: in a real process it would end it, or be in its log."""
        self._on_crash(self, exc)

    def freeze(self) -> None:
        """As SIGSTOP does, for its children too; nothing when it is dead."""
        if not self.alive:
            return
        self.frozen = True
        for child in self._children:
            child.freeze()

    def thaw(self) -> None:
        """As SIGCONT does."""
        self.frozen = False
        parked, self._parked = self._parked, []
        for task in parked:
            trio.lowlevel.reschedule(task)
        for child in list(self._children):
            child.thaw()

    def kill(self) -> None:
        """As SIGKILL does, or its own end; its children, and whatever tasks are left, are gone with it."""
        if not self.alive:
            return
        self.alive = self.frozen = False
        for child in list(self._children):
            child.kill()
        parked, self._parked = self._parked, []
        for task in parked:
            trio.lowlevel.reschedule(task)
        for task in list(self._tasks):
            # those that cannot be woken wait for tasks of this process, which end now
            if task not in parked and task._abort_func is not None:
                task._attempt_abort(_raise_killed)
        serving, self._serving = self._serving, {}
        for give_up in serving.values():
            give_up(ProcessGone(self.name))
        self._ended()

    def _ended(self) -> None:
        if self.parent is not None:
            self.parent._children.pop(self, None)
        ends, self.on_end = self.on_end, []
        for call in ends:
            call()

    async def _instead_of(self, task: Task, coro: Coroutine[Any, Any, Any]) -> Any:
        return await self._stepped(task, coro)

    @types.coroutine
    def _stepped(self, task: Task, coro: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        self._tasks[task] = None
        value: Any = None
        try:
            while True:
                while self.frozen:
                    self._parked.append(task)
                    yield WaitTaskRescheduled(_not_while_frozen)
                if not self.alive:
                    _abandon(task, coro)
                    return None
                try:
                    trap = coro.send(value)
                except StopIteration as stop:
                    return stop.value
                value = yield trap
        finally:
            self._tasks.pop(task, None)


def _not_while_frozen(_: object) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED


def _raise_killed() -> None:
    raise _Killed


def _abandon(task: Task, coro: Coroutine[Any, Any, Any]) -> None:
    # trio would complain about nurseries that are left open
    task._child_nurseries.clear()
    if inspect.getcoroutinestate(coro) == inspect.CORO_CREATED:
        coro.close()
    else:
        _abandoned.append(coro)


def forget_generators() -> None:
    """Have trio not end the asynchronous generators of killed processes, when its run ends."""
    trio_run.GLOBAL_RUN_CONTEXT.runner.asyncgens.alive.clear()


def this_process() -> SimulatedProcess:
    """The process whose task is running. LookupError outside of all."""
    found = _process.get()
    if found is None:
        raise LookupError("this task is of no simulated process")
    return found
