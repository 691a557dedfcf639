"""A vocabulary of faults: who fails, and how.

A job's part has several nodes, or none for a while: :func:`candidates`. :func:`strike` strikes one, and
:func:`recover` heals: it wakes, joins, repairs, or starts a killed node again with the same configuration.

``kill`` and ``stop`` (a freeze, of the process and all its children) strike nodes and executors, the rest
nodes only: ``cut`` and ``slow`` need a network in a :class:`~hypha.cli.local.lab.Star`, ``fill_disk`` a
:meth:`~hypha.cli.local.network.Network.small_disk`, ``corrupt`` a node that keeps something.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

import psutil

from hypha.cli.local.children import Child, NetworkFailed
from hypha.cli.local.network import Network, base
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
How = Literal["kill", "stop", "cut", "slow", "corrupt", "fill_disk"]

#: what is left of a slow node's line, each way: a poor connection of a home
SLOW_BYTES_PER_S = 100_000
_ROTTEN_BYTES = 64
_FILLER = "filler"
_CHUNK = bytes(1 << 16)
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


def strike(job: TargetJob, role: Role, how: How, before: JobSnapshot, name: str | None = None) -> StruckNode:
    """Strike now; ``before`` says who has which part in the job. NetworkFailed when nobody has that one."""
    node, network = candidates(job, role, before, name)[0], job.network
    number = next(_numbers)
    pids: tuple[int, ...] = ()
    if how in ("kill", "stop"):
        pids = _processes(node, role, how)
        send_signal(pids, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        if how == "stop":
            network.wounds[number] = lambda: send_signal(pids, signal.SIGCONT)
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
        server = {seen.parameter_server or ""}
        trainers = {worker.peer for worker in seen.workers} - server
        found = workers_of(job.network, server if role.startswith("parameter-server") else trainers)
    if not found:
        raise NetworkFailed(f"nobody is a {name or role} in {seen}")
    return found


def _program(role: Role) -> str:
    return role if role in ("scheduler", "data", "gateway") else "worker"


def workers_of(network: Network, peers: Collection[str]) -> list[Child]:
    running = network.running("worker")
    return [child for child in running if network.peer_id(base(child.name), "worker") in peers]


def executors(node: Child, module: str) -> list[int]:
    """PIDs of the executors of that module which this worker runs, not of their keepers or forks."""
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
    """Keepers whose lifelines this worker holds: not all its children, an executor host forks them too."""
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


def _processes(node: Child, role: Role, how: How) -> tuple[int, ...]:
    """What a signal goes to: an executor, or a node's own process; a freeze takes its children along."""
    if not role.endswith("executor"):
        return (node.process.pid,) if how == "kill" else tuple(one.pid for one in processes(node))
    tops = executors(node, "parameter_server" if role.startswith("parameter") else "training")
    if not tops:
        raise NetworkFailed(f"{node.name} runs no {role}")
    below = () if how == "kill" else (psutil.Process(top).children(recursive=True) for top in tops)
    return (*tops, *(child.pid for children in below for child in children))


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


def send_signal(pids: tuple[int, ...], number: signal.Signals) -> None:
    for pid in pids:
        # what froze with its worker may have ended with it
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).send_signal(number)


def corrupt(network: Network, role: str, name: str) -> Callable[[], None]:
    """Turn the bits of some bytes in the middle of a file of node ``name``; its size and times stay, as when
    a disk rots. A data node's first slice, a worker's cached slice that no job uses at the moment (else any),
    or the newest checkpoint, for the scheduler and the parameter server. Returns what turns them back.
    """
    path = _victim(network, role, name)
    before = path.stat()
    at = before.st_size // 2

    def turn() -> None:
        try:
            now = path.stat()
        except FileNotFoundError:
            return
        if (now.st_ino, now.st_size) != (before.st_ino, before.st_size):
            return  # somebody has replaced it meanwhile
        os.chmod(path, 0o600)
        with path.open("r+b") as file:
            file.seek(at)
            rotten = bytes(byte ^ 0xFF for byte in file.read(_ROTTEN_BYTES))
            file.seek(at)
            file.write(rotten)
        os.chmod(path, before.st_mode)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    turn()
    return turn


def _victim(network: Network, role: str, name: str) -> Path:
    config = network.config(name)
    if role == "data":
        found = sorted(Path(config["datasets"][0]["path"]).glob("slice-*.safetensors"))[:1]
    elif role == "worker":
        cached = (Path(config["work_dir"]) / "cache").glob("*.safetensors")
        found = sorted(cached, key=lambda path: (path.stat().st_nlink, path.name))[:1]
    elif role in ("scheduler", "parameter-server"):
        state = Path(network.config("scheduler")["state_dir"])
        kept = state.glob("*/checkpoints/round-*/theta.safetensors")
        found = sorted(kept, key=lambda path: int(path.parent.name.removeprefix("round-")))[-1:]
    else:
        raise NetworkFailed(f"a {role} keeps no files that could be corrupted")
    if not found:
        raise NetworkFailed(f"{name} has nothing yet that could be corrupted")
    return found[0]


def fill_disk(network: Network, name: str) -> Callable[[], None]:
    """Leave no byte free where node ``name`` works, a small disk. Returns what makes room again."""
    config = network.config(name)
    directory = Path(config.get("work_dir") or config.get("state_dir") or network.root / name)
    if directory not in network.disks:
        raise NetworkFailed(f"{directory} of {name} is no small disk: it is not filled")
    filler = directory / _FILLER
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(_CHUNK)
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
    return lambda: filler.unlink(missing_ok=True)
