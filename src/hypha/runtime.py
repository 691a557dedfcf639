"""What code takes from the machine below it, besides the network: threads, chance, new names, the disk's free
space and the time of day.

In a node's own process these are the operating system's. In a simulated world (:mod:`hypha.simulation`) each
node runs under a :class:`Runtime` of its own, so that a run depends on one seed alone: blocking calls run at
once in the loop, chance is seeded, and disks are as full as the world wants them. Which one is in force is a
context variable: tasks inherit it from whoever started them.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar, TypeVarTuple
from uuid import UUID

import trio

from hypha.files import disks

#: Left to others. More than transfers leave, so that a full disk is noticed here first, by name.
RESERVE_BYTES = 32 << 20

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Runtime:
    """The operating system's own."""

    #: a node of a simulated world shows nothing of itself: its worlds come and go by the thousand
    simulated = False

    def __init__(self) -> None:
        self.random: random.Random = random.SystemRandom()

    async def in_thread(
        self,
        call: Callable[[*Ts], T],
        *args: *Ts,
        limiter: trio.CapacityLimiter | None = None,
        abandon_on_cancel: bool = False,
    ) -> T:
        """What the blocking ``call(*args)`` returns or raises."""
        return await trio.to_thread.run_sync(
            call, *args, limiter=limiter, abandon_on_cancel=abandon_on_cancel
        )

    def check_cancelled(self) -> None:
        """In such a call: raise when whoever waits for it was cancelled."""
        trio.from_thread.check_cancelled()

    def free_bytes(self, directory: Path) -> int:
        """What an ordinary user may still write to the file system of ``directory``. Raises OSError."""
        return disks.free_bytes(directory)

    def wall_time(self) -> float:
        """Seconds since 1970, as far as this machine knows. It may jump: for the age of files alone."""
        return time.time()


_current: ContextVar[Runtime] = ContextVar("runtime", default=Runtime())  # noqa: B039 - one for the process


@contextlib.contextmanager
def use_runtime(runtime: Runtime) -> Iterator[None]:
    """Have ``runtime`` in force, for the tasks that are started meanwhile, too."""
    token = _current.set(runtime)
    try:
        yield
    finally:
        _current.reset(token)


async def in_thread(
    call: Callable[[*Ts], T],
    *args: *Ts,
    limiter: trio.CapacityLimiter | None = None,
    abandon_on_cancel: bool = False,
) -> T:
    """As :meth:`Runtime.in_thread`."""
    return await _current.get().in_thread(call, *args, limiter=limiter, abandon_on_cancel=abandon_on_cancel)


def check_cancelled() -> None:
    """As :meth:`Runtime.check_cancelled`."""
    _current.get().check_cancelled()


def chance() -> random.Random:
    """Where pauses and choices get their randomness from. Never for keys."""
    return _current.get().random


def new_id() -> str:
    """32 hexadecimal digits that nobody has had before."""
    return UUID(int=chance().getrandbits(128), version=4).hex


def free_bytes(directory: Path) -> int:
    """As :meth:`Runtime.free_bytes`."""
    return _current.get().free_bytes(directory)


def lack_of_space(directory: Path, size: int = 0) -> str | None:
    """Why ``size`` more bytes do not fit into the existing ``directory``; None when they do. Asked before
    something is taken on that could not be written.
    """
    try:
        free = free_bytes(directory)
    except OSError as exc:
        return f"{directory} cannot be used: {exc.strerror or exc}"
    if free >= size + RESERVE_BYTES:
        return None
    needed = f"{size / 1e6:.1f} MB are needed and " if size else ""
    return f"the disk of {directory} is full: {needed}{free / 1e6:.1f} MB are free; make space there"


def is_simulated() -> bool:
    """Whether this node is one of a simulated world, which has no metrics."""
    return _current.get().simulated


def wall_time() -> float:
    """As :meth:`Runtime.wall_time`."""
    return _current.get().wall_time()


async def when_cancelled(call: Callable[[], None]) -> None:
    """Until this is cancelled, and then ``call``."""
    try:
        await trio.sleep_forever()
    finally:
        call()


@contextlib.asynccontextmanager
async def outlasting(last_s: float) -> AsyncIterator[tuple[trio.CancelScope, trio.CancelScope]]:
    """Two scopes: cancelled from outside, the first is cancelled at once, the second, shielded, ``last_s``
    later. So a node lives until its peers have been told of the end.
    """
    first, last = trio.CancelScope(), trio.CancelScope(shield=True)

    def pass_on() -> None:
        first.cancel()
        last.deadline = trio.current_time() + last_s

    async with trio.open_nursery() as nursery:
        nursery.start_soon(when_cancelled, pass_on)
        yield first, last
        nursery.cancel_scope.cancel()
