"""Striking a simulated world, and mending what was struck."""

from __future__ import annotations

import contextlib
import gc
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from random import Random

import trio

from hypha.journal import JournalEntry
from hypha.runtime import in_thread
from hypha.simulation.process import SimulatedProcess
from hypha.simulation.scenario import LIES, PHASES, Scenario, Strike, gives_notice
from hypha.simulation.world import SCHEDULER, Computer, World

#: a node that was told to end is to be gone within this
STOP_S = 5.0
_LOSS = 0.2
_SLOWED = 0.01
_SLOW_DISK_S = 0.5
_CLOCK_S = 3e6


@dataclass
class FaultOutcome:
    """What became of a fault: ``target`` is empty while its moment has not come, or nobody had that part."""

    fault: Strike
    target: str = ""
    struck_at: float | None = None
    mended_at: float | None = None


def watch_for(world: World, fault: Strike) -> trio.Event:
    """Set when the job is in that phase of that round, or further."""
    moment = trio.Event()
    wanted = (fault.round, PHASES.index(fault.phase))

    def listen(entry: JournalEntry) -> None:
        if entry.machine != "rounds" or isinstance(entry.state, str):
            return
        phase, round_ = entry.state["phase"], entry.state["round"]
        if phase not in PHASES or not isinstance(round_, int):
            return
        reached = (round_, PHASES.index(phase)) >= wanted
        if fault.phase == "exporting":
            reached = phase == "exporting"
        if reached:
            world.listeners.remove(listen)
            moment.set()

    world.listeners.append(listen)
    return moment


async def strike(world: World, number: int, fault: Strike, moment: trio.Event, struck: FaultOutcome) -> None:
    """Wait for ``moment``, do it, and mend it after a while."""
    await moment.wait()
    await trio.sleep(fault.after_s)
    random = world.random(f"fault {number}")
    if fault.role.endswith("executor"):
        await _strike_executor(world, fault, random, struck)
        return
    computer = _machine(world, fault, random)
    if computer is None:
        return
    struck.target, struck.struck_at = computer.name, trio.current_time()
    if fault.way in LIES:
        _have_lie(world, computer, fault)
        struck.mended_at = trio.current_time()
        return
    await _strike_machine(world, computer, fault, random)
    struck.mended_at = trio.current_time()


def _have_lie(world: World, computer: Computer, fault: Strike) -> None:
    computer.lies.add(fault.way)
    if fault.way == "boast":
        computer.lies.add("never-load")
        world.kill(computer.name)
        world.start(computer.name)


def _machine(world: World, fault: Strike, random: Random) -> Computer | None:
    computers = world.computers
    if fault.role == "scheduler":
        return computers[SCHEDULER]
    if fault.role == "data":
        return computers[random.choice(world.data)]
    if fault.role == "gateway":
        return computers[random.choice(world.gateways)]
    serving = [name for name in world.workers if _runs(computers[name], "aggregate")]
    training = [name for name in world.workers if _runs(computers[name], "train")]
    if fault.role == "parameter-server":
        found = serving
    else:
        found = [name for name in training if name not in serving] or training or list(world.workers)
    return computers[random.choice(found)] if found else None


def _runs(computer: Computer, kind: str) -> bool:
    return computer.executors is not None and kind in computer.executors.running


async def _strike_executor(world: World, fault: Strike, random: Random, struck: FaultOutcome) -> None:
    kind = "aggregate" if fault.role.startswith("parameter-server") else "train"
    found: list[tuple[str, SimulatedProcess]] = []
    for name in world.workers:
        executors = world.computers[name].executors
        if executors is not None and kind in executors.running:
            found.append((name, executors.running[kind]))
    if not found:
        return
    name, process = random.choice(found)
    struck.target, struck.struck_at = process.name, trio.current_time()
    if fault.way == "stall":
        executors = world.computers[name].executors
        if executors is not None:
            executors.stalled[process] = trio.current_time() + fault.for_s
        # nobody waits for its end: the others go on without it
    elif fault.way == "freeze":
        await _freeze(process, fault.for_s)
    else:
        process.kill()
    struck.mended_at = trio.current_time()


async def _freeze(process: SimulatedProcess, for_s: float) -> None:
    process.freeze()
    await trio.sleep(for_s)
    if process.alive:
        process.thaw()


async def _strike_machine(world: World, computer: Computer, fault: Strike, random: Random) -> None:
    name, network = computer.name, world.network
    others = [other for other in world.computers if other != name]
    match fault.way:
        case "kill" | "lose":
            world.kill(name)
            if fault.way == "kill":
                await trio.sleep(fault.for_s)
                world.start(name)
        case "restart":
            await world.stop(name, STOP_S + (world.scenario.notice_s if _has_notice(world, name) else 0.0))
            await trio.sleep(fault.for_s)
            world.start(name)
        case "notice":
            await world.give_notice(name, STOP_S)
            await trio.sleep(fault.for_s)
            world.start(name)
        case "freeze":
            process = computer.process
            if process is not None and process.alive:
                network.touch()
                await _freeze(process, fault.for_s)
                network.touch()
        case "cut" | "deaf" | "mute" | "partition":
            inward, outward = fault.way != "mute", fault.way != "deaf"
            if fault.way == "partition":
                others = [other for other in others if other in world.workers]
            pairs = [(other, name) for other in others if inward] + [
                (name, other) for other in others if outward
            ]
            for source, target in pairs:
                network.cut(source, target)
            await trio.sleep(fault.for_s)
            for source, target in pairs:
                network.mend(source, target)
        case "slow":
            computer.machine.slowed *= _SLOWED
            network.touch()
            await trio.sleep(fault.for_s)
            computer.machine.slowed /= _SLOWED
            network.touch()
        case "lossy":
            computer.machine.loss += _LOSS
            await trio.sleep(fault.for_s)
            computer.machine.loss -= _LOSS
        case "corrupt":
            await _corrupt(world, computer, fault, random)
        case "full-disk":
            computer.full = True
            _fill_databases(computer.directory, True)
            await trio.sleep(fault.for_s)
            computer.full = False
            _fill_databases(computer.directory, False)
        case "slow-disk":
            world.slow_disk(computer, _SLOW_DISK_S)
            await trio.sleep(fault.for_s)
            world.slow_disk(computer, -_SLOW_DISK_S)
        case "clock":
            computer.clock_offset_s += random.choice((-1, 1)) * _CLOCK_S


def _fill_databases(directory: Path, full: bool) -> None:
    """SQLite's own limit of pages stands in for the disk's."""
    for found in [one for one in gc.get_objects() if type(one) is sqlite3.Connection]:
        with contextlib.suppress(sqlite3.Error):
            ((_, _, path),) = found.execute("PRAGMA database_list").fetchall()[:1]
            if path.startswith(f"{directory}/"):
                (pages,) = found.execute("PRAGMA page_count").fetchone()
                found.execute(f"PRAGMA max_page_count = {pages if full else 1 << 30}")


def _has_notice(world: World, name: str) -> bool:
    """SIGTERM is a notice, too, where one is expected."""
    return name in world.workers and gives_notice(world.scenario)


async def _corrupt(world: World, computer: Computer, fault: Strike, random: Random) -> None:
    """Another byte in a file that it keeps: a slice, a cached one, a checkpoint. A data node's is mended."""
    patterns = ("dataset/slice-*", "work/cache/*.safetensors", "state/*/checkpoints/*/*.safetensors")
    files = sorted(path for pattern in patterns for path in computer.directory.glob(pattern))
    if not files:
        return
    path: Path = random.choice(files)
    before, mode = await in_thread(path.read_bytes), (await in_thread(path.stat)).st_mode
    damaged = bytearray(before)
    damaged[-1 - random.randrange(8)] ^= 0xFF
    # a file of its own: links that somebody else holds are other files on a real disk
    part = path.with_name(f".{path.name}.damaged")
    part.write_bytes(damaged)
    part.chmod(mode)
    part.replace(path)
    world.damaged.add(path)
    if computer.machine.roles == {"data"}:
        await trio.sleep(fault.for_s)
        part.write_bytes(before)
        part.replace(path)


async def story(world: World) -> list[FaultOutcome]:
    """Start everybody, strike as the scenario says, and wait until the job is over."""
    scenario: Scenario = world.scenario
    random = world.random("story")
    found = [FaultOutcome(fault) for fault in scenario.faults]
    moments = [watch_for(world, fault) for fault in scenario.faults]
    async with trio.open_nursery() as nursery:
        for name in world.computers:
            world.start(name)
            await trio.sleep(random.uniform(0.0, 0.3))
        for number, struck in enumerate(found):
            nursery.start_soon(strike, world, number, struck.fault, moments[number], struck)
        while not world.over.is_set():
            last = max((one.mended_at or 0.0 for one in found), default=0.0)
            striking = any(one.struck_at is not None and one.mended_at is None for one in found)
            if not striking and trio.current_time() > last + scenario.patience_s:
                world.problems.append(
                    f"the job is not over {scenario.patience_s:g} s after the last fault was mended: "
                    f"{world.snapshot.message if world.snapshot is not None else 'it has not begun'}"
                )
                break
            with trio.move_on_after(5.0):
                await world.over.wait()
        # what is struck is mended all the same; what has not been, is not
        while any(one.struck_at is not None and one.mended_at is None for one in found):  # noqa: ASYNC110
            await trio.sleep(0.5)
        nursery.cancel_scope.cancel()
    return found
