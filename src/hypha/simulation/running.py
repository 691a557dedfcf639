"""Running a scenario to its end: trio's order of tasks, the clock and the log follow from its seed alone, and
everything that must be true is checked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import trio
import trio.testing
from msgspec import Struct
from trio._core import _run as trio_run

from hypha.executor.toy import one_thread_only
from hypha.runtime import use_runtime
from hypha.simulation.faults import FaultOutcome, story
from hypha.simulation.invariants import (
    GoodputWatch,
    LeaseWatch,
    RoundWatch,
    check_checkpoints,
    check_goodput,
    check_ledgers,
    settled,
    watch_checkpoints,
)
from hypha.simulation.process import SimulatedRuntime, Stepping, forget_generators, this_process
from hypha.simulation.scenario import Scenario
from hypha.simulation.world import FREE_BYTES, World

_LOG_LINES = 5000


class ScenarioVerdict(Struct, frozen=True):
    """What came of a scenario. ``problems`` is empty when all was as it must be."""

    scenario: Scenario
    problems: tuple[str, ...]
    struck: tuple[str, ...]
    lasted_s: float
    took_s: float
    log: tuple[str, ...] = ()
    journal: bytes = b""


def run_scenario(scenario: Scenario, root: Path | None = None, level: int = logging.INFO) -> ScenarioVerdict:
    """Make its world below ``root``, which is deleted unless given, have the story happen, and end it."""
    one_thread_only()
    began = time.monotonic()
    place = root or _scratch_directory()
    worlds: list[World] = []
    struck: list[FaultOutcome] = []
    lasted_s = 0.0

    async def main() -> None:
        nonlocal lasted_s
        # of what is no process of this world: a thread would end at a moment that no seed decides
        outside = SimulatedRuntime(scenario.seed, trio.current_time, lambda _: FREE_BYTES)
        try:
            with use_runtime(outside):
                async with trio.open_nursery() as nursery:
                    world = World(scenario, place, nursery)
                    worlds.append(world)
                    nursery.start_soon(world.network.run)
                    try:
                        struck.extend(await _watched_story(world))
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
    return ScenarioVerdict(
        scenario,
        tuple(dict.fromkeys(world.problems)),
        tuple(
            f"{one.fault.way} {one.target} at {one.struck_at}" for one in struck if one.struck_at is not None
        ),
        lasted_s,
        time.monotonic() - began,
        tuple(log.lines),
        b"\n".join(world.entries),
    )


async def _watched_story(world: World) -> list[FaultOutcome]:
    rounds = RoundWatch()
    world.listeners.append(rounds.listen)
    world.worker_listeners.append(lambda name: LeaseWatch(name, world.problems.append).listen)
    world.observers.append(GoodputWatch(world.problems.append).look)
    world.checks.append(check_checkpoints)
    world.nursery.start_soon(watch_checkpoints, world)
    struck = await story(world)
    # how long others keep the workers is not known
    if not world.scenario.rivals:
        world.problems += rounds.check(struck, trio.current_time())
    if world.failure is not None:
        world.problems.append(f"the job failed: {world.failure}")
    world.problems += await settled(world)
    world.problems += check_checkpoints(world)
    world.problems += check_ledgers(world)
    world.problems += check_goodput(world)
    return struck


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


def _scratch_directory() -> Path:
    """A new directory, in memory where there is such a place: a run syncs files by the hundred."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="hypha-world-", dir=place))
