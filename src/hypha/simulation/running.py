"""Running a world to its end: trio's order of tasks, the clock and the log follow from its seed alone."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import trio
import trio.testing
from trio._core import _run as trio_run

from hypha.errors import HyphaError
from hypha.scheduler import JobResult
from hypha.simulation.process import Stepping, forget_generators, this_process
from hypha.simulation.scenario import Scenario
from hypha.simulation.world import World

_LOG_LINES = 5000


@dataclass
class Ending:
    """What came of a run. ``problems`` is empty when all was as it must be."""

    problems: list[str]
    result: JobResult | None
    failure: HyphaError | None
    lasted_s: float
    log: list[str]
    journal: list[bytes]


class _Log(logging.Handler):
    """Keeps the last lines, with the world's time and the process that logged them."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: deque[str] = deque(maxlen=_LOG_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            at = f"{trio.current_time():9.3f}"
            who = this_process().name
        except (RuntimeError, LookupError):
            at, who = "        -", "world"
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f" [{record.exc_info[1]!r}]\n{''.join(traceback.format_exception(record.exc_info[1]))}"
        peer = getattr(record, "peer_id", getattr(record, "worker_peer_id", ""))
        self.lines.append(f"{at} {who}: {record.levelname} {text} {peer}".rstrip())


@contextlib.contextmanager
def _logged(level: int) -> Iterator[_Log]:
    log = _Log()
    root = logging.getLogger("hypha")
    before, propagate = root.level, root.propagate
    root.addHandler(log)
    root.setLevel(level)
    root.propagate = False
    try:
        yield log
    finally:
        root.removeHandler(log)
        root.setLevel(before)
        root.propagate = propagate


@contextlib.contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """trio's own order of tasks follows from ``seed``."""
    name = "_ALLOW_DETERMINISTIC_SCHEDULING"
    before = getattr(trio_run, name)
    state = trio_run._r.getstate()
    setattr(trio_run, name, True)
    trio_run._r.seed(seed)
    try:
        yield
    finally:
        setattr(trio_run, name, before)
        trio_run._r.setstate(state)


def scratch_directory() -> Path:
    """A new directory, in memory where there is such a place: a run syncs files by the hundred."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="hypha-world-", dir=place))


def run_world(
    scenario: Scenario, live: Callable[[World], object], root: Path | None = None, level: int = logging.INFO
) -> Ending:
    """Make the world, have ``await live(world)`` be its story, end it, and delete ``root`` unless given."""
    place = root or scratch_directory()
    worlds: list[World] = []
    lasted_s = 0.0

    async def main() -> None:
        nonlocal lasted_s
        try:
            async with trio.open_nursery() as nursery:
                world = World(scenario, place, nursery)
                worlds.append(world)
                nursery.start_soon(world.network.run)
                try:
                    await live(world)  # type: ignore[misc]
                finally:
                    lasted_s = trio.current_time()
                    for name in world.computers:
                        world.kill(name)
                    nursery.cancel_scope.cancel()
        finally:
            forget_generators()

    try:
        with _deterministic(scenario.seed), _logged(level) as log:
            clock = trio.testing.MockClock(autojump_threshold=0)
            trio.run(main, clock=clock, instruments=[Stepping()])
    finally:
        if root is None:
            shutil.rmtree(place, ignore_errors=True)
    (world,) = worlds
    return Ending(world.problems, world.result, world.failure, lasted_s, list(log.lines), world.entries)
