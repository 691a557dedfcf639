"""A vocabulary of faults: who fails, when (round and phase), and how.

``await fail_at(TargetJob(network, scheduler), "worker", 2, "training", "kill")`` waits for that moment of the
running job and strikes a worker that trains but does not host the parameter server; :func:`strike` does not
wait. :func:`recover` heals: it wakes, joins, repairs, or starts a killed node again with the same
configuration.

``kill`` and ``stop`` (a freeze, of the process and all its children) strike nodes and executors, the rest
nodes only: ``cut`` and ``slow`` need a network in a :class:`~hypha.cli.local.lab.Star`, ``fill_disk`` a
:meth:`~hypha.cli.local.network.Network.small_disk`, ``corrupt`` a node that keeps something.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Literal

import psutil
import trio

from hypha.cli.chaos.damage import corrupt, fill_disk
from hypha.cli.local.children import Child
from hypha.cli.local.network import JOB_S, Network, NetworkFailed, base
from hypha.scheduler.status.snapshot import JobSnapshot

Role = Literal[
    "worker",
    "parameter-server",
    "training-executor",
    "parameter-server-executor",
    "scheduler",
    "data",
    "gateway",
]
Phase = Literal["training", "scheduled", "updating", "broadcasting", "last-round"]
How = Literal["kill", "stop", "cut", "slow", "corrupt", "fill_disk", "none"]

#: what is left of a slow node's line, each way: a poor connection of a home
SLOW_BYTES_PER_S = 100_000
#: between two looks at a log: theta of a small model is under way for a few milliseconds only
_LOOK_S = 0.003
#: members that are not waited for
_AWAY = ("unreachable", "loading")
_numbers = count()


@dataclass(frozen=True)
class TargetJob:
    """The running job whose nodes are struck: the network, and its scheduler."""

    network: Network
    scheduler: Child


@dataclass(frozen=True)
class StruckNode:
    """What was struck: the node, the processes, and the job as it was seen just before."""

    role: Role
    node: Child
    how: How
    pids: tuple[int, ...]
    before: JobSnapshot
    #: its number among the network's wounds; a kill leaves none
    number: int


async def fail_at(
    job: TargetJob,
    role: Role,
    round_: int,
    phase: Phase = "training",
    how: How = "kill",
    name: str | None = None,
) -> StruckNode:
    """Strike ``role`` in that phase of round ``round_`` (from 0), or of a later one if it was over too
    soon to be seen. ``name`` chooses among several nodes of a role. ``none`` does nothing: what happens at
    that moment is the caller's.
    """
    if phase == "updating":
        before = await _updating(job, role, round_)
    elif phase == "broadcasting":
        before = await _trained(job, round_)
        # the snapshot is a little old, so it may be the next round that ends first
        await _written(job.scheduler, " was applied: ", JOB_S)
    elif phase == "scheduled":
        before = await job.network.reached(
            job.scheduler, lambda seen: seen.round >= round_ and seen.phase == "scheduled"
        )
    elif phase == "last-round":
        before = await _trained(job, None)
    else:
        before = await _trained(job, round_)
    return strike(job, role, how, before, name)


def strike(job: TargetJob, role: Role, how: How, before: JobSnapshot, name: str | None = None) -> StruckNode:
    """Strike now; ``before`` says who has which part in the job. NetworkFailed when nobody has that one."""
    node, network = candidates(job, role, before, name)[0], job.network
    number = next(_numbers)
    pids: tuple[int, ...] = ()
    if how in ("kill", "stop"):
        pids = _processes(node, role, how)
        _send(pids, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        if how == "stop":
            network.wounds[number] = lambda: _send(pids, signal.SIGCONT)
    elif how == "none":
        pass
    elif role.endswith("executor"):
        raise NetworkFailed(f"a {role} is a process: {how} is for nodes")
    else:
        network.wounds[number] = _wound(network, role, how, node)
    return StruckNode(role, node, how, pids, before, number)


async def recover(network: Network, fault: StruckNode) -> Child:
    """Heal it, or start a killed node again; the running node. (Executors are their worker's concern.)"""
    undo = network.wounds.pop(fault.number, None)
    if undo is not None:
        undo()
    if fault.how == "kill" and not fault.role.endswith("executor"):
        return await again(network, fault.node, _program(fault.role))
    return fault.node


async def again(network: Network, node: Child, program: str) -> Child:
    """Start a killed node once more, as it was; its log is a new file."""
    await node.process.wait()
    name, _, number = node.name.partition("+")
    return await network.start(f"{name}+{int(number or 0) + 1}", program, network.root / f"{name}.toml")


def candidates(job: TargetJob, role: Role, seen: JobSnapshot, name: str | None = None) -> list[Child]:
    """The running nodes that have this part in the job; NetworkFailed when there is none."""
    if role == "scheduler":
        return [job.scheduler]
    program = _program(role)
    if name is not None:
        found = [child for child in job.network.running(program) if base(child.name) == name]
    elif program != "worker":
        found = job.network.running(program)
    else:
        trainers = {worker.peer for worker in seen.workers} - {seen.parameter_server}
        peers = {seen.parameter_server} if role.startswith("parameter-server") else trainers
        found = _workers(job.network, peers)
    if not found:
        raise NetworkFailed(f"nobody is a {name or role} in {seen}")
    return found


def _program(role: Role) -> str:
    return role if role in ("scheduler", "data", "gateway") else "worker"


def _workers(network: Network, peers: Collection[str]) -> list[Child]:
    running = network.running("worker")
    return [child for child in running if network.peer_id(base(child.name), "worker") in peers]


def executors(node: Child, module: str) -> list[int]:
    """PIDs of the executors of ``hypha.executor.<module>`` that this worker runs; neither their keepers, nor
    what they have forked.
    """
    found = []
    for keeper in _keepers(node):
        for process in keeper.children():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                # for a moment a keeper's child still looks like the keeper
                if f"hypha.executor.{module}" in command and not _is_keeper(command):
                    found.append(process.pid)
    return found


def processes(node: Child) -> list[psutil.Process]:
    """A node's own process and all that it runs, its executors included, whoever has forked them."""
    found: dict[int, psutil.Process] = {}
    for top in (psutil.Process(node.process.pid), *_keepers(node)):
        with contextlib.suppress(psutil.Error):
            found |= {one.pid: one for one in (top, *top.children(recursive=True))}
    return list(found.values())


def _keepers(node: Child) -> list[psutil.Process]:
    """Keepers of executors whose lifelines this worker holds. They need not be its children: an executor host
    forks them too.
    """
    held = _pipes(node.process.pid)
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.readlink(f"/proc/{process.pid}/fd/0") in held and _is_keeper(process.cmdline()):
                found.append(process)
    return found


def _is_keeper(command: list[str]) -> bool:
    return any(word.endswith("keeper.py") for word in command)


def _pipes(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return {one for one in found if one.startswith("pipe:")}


@contextmanager
def asleep(*pids: int) -> Iterator[None]:
    """These processes do nothing meanwhile."""
    _send(pids, signal.SIGSTOP)
    try:
        yield
    finally:
        _send(pids, signal.SIGCONT)


def _processes(node: Child, role: Role, how: How) -> tuple[int, ...]:
    """What a signal goes to: an executor, or a node's own process; a freeze takes its children along."""
    pids = (
        tuple(executors(node, "parameter_server" if role.startswith("parameter") else "training"))
        if role.endswith("executor")
        else (node.process.pid,)
    )
    if not pids:
        raise NetworkFailed(f"{node.name} runs no {role}")
    if how == "kill":
        return pids
    if role.endswith("executor"):
        return tuple(pid for top in pids for pid in _tree(top))
    return tuple(one.pid for one in processes(node))


def _wound(network: Network, role: Role, how: How, node: Child) -> Callable[[], None]:
    """Strike a node other than by a signal; what undoes it."""
    name = base(node.name)
    if how == "corrupt":
        return corrupt(network, role, name)
    if how == "fill_disk":
        return fill_disk(network, name)
    star = network.star
    if star is None:
        raise NetworkFailed(f"{how} needs a network whose nodes are in namespaces of their own")
    if how == "cut":
        star.cut(name, True)
        return lambda: star.cut(name, False)
    star.slow(name, SLOW_BYTES_PER_S)
    return lambda: star.slow(name, None)


def _send(pids: tuple[int, ...], number: signal.Signals) -> None:
    for pid in pids:
        # what froze with its worker may have ended with it
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).send_signal(number)


def _tree(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


async def _trained(job: TargetJob, round_: int | None) -> JobSnapshot:
    """Every worker of the round has trained a little; ``None`` is the last round."""

    def holds(seen: JobSnapshot) -> bool:
        wanted = seen.rounds - 1 if round_ is None else round_
        return (
            seen.round >= wanted
            and seen.phase in ("training", "scheduled")
            and any(worker.batches for worker in seen.workers)
            and all(worker.batches or worker.state in _AWAY for worker in seen.workers)
        )

    return await job.network.reached(job.scheduler, holds)


async def _updating(job: TargetJob, role: Role, round_: int) -> JobSnapshot:
    """One update is in, another held back: a worker that is not the victim sleeps meanwhile. It is chosen
    again when rounds go by without it, as its executor may just have been replaced.
    """
    while True:
        seen = await _trained(job, round_)
        bystander = _bystander(job, role, seen)
        if bystander is None:
            await trio.sleep(_LOOK_S)
            continue

        def shown(now: JobSnapshot, passed: int = seen.round + 2) -> bool:
            return now.phase == "updating" or now.round >= passed

        with asleep(bystander):
            now = await job.network.reached(job.scheduler, shown)
        if now.phase == "updating":
            return now


def _bystander(job: TargetJob, role: Role, seen: JobSnapshot) -> int | None:
    """The executor of somebody who trains and is not the victim, if there is one."""
    [victim, *_] = candidates(job, role, seen)
    trainers = _workers(job.network, {worker.peer for worker in seen.workers if worker.batches})
    pids = (pid for child in trainers if child is not victim for pid in executors(child, "training"))
    return next(pids, None)


async def _written(child: Child, text: str, timeout_s: float) -> None:
    """Return within milliseconds of ``text`` being added to its log."""
    at, tail = child.log.stat().st_size, b""
    with trio.fail_after(timeout_s), child.log.open("rb") as log:
        log.seek(at)
        while text.encode() not in tail:
            await trio.sleep(_LOOK_S)
            tail = tail[-len(text) :] + log.read()
