"""The machine: limits, buffers, disks, versions, GPUs."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio

from hypha.cli.doctor.gathered import Accelerators, Directory, MachineObservations
from hypha.cli.doctor.gathering.bounded import Gathering
from hypha.config.inherited import child_environment
from hypha.config.models import NodeConfig, SchedulerConfig, WorkerConfig
from hypha.decoding import decode
from hypha.errors import HyphaError, Undecodable
from hypha.net.bulk.socket_buffers import Buffers
from hypha.runtime import free_bytes, in_thread
from hypha.telemetry.health import versions
from hypha.worker.limits.detecting import DetectedMachine, detect

DISK_S = 30.0
ACCELERATORS_S = 60.0
_MB = 1 << 20
#: so much is written at most, for so long at most, and only where so much is free
_WRITTEN_BYTES, _WRITTEN_S, _LEAST_FREE_BYTES = 32 * _MB, 2.0, 256 * _MB
#: bytes a second; what is slower is measured again
_QUICK = 20 * _MB
_DRIVER = Path("/proc/driver/nvidia/version")
_BUFFERS = Path("/proc/sys/net/ipv4")


async def gather_machine(
    gathering: Gathering, config: NodeConfig | None, driver: Path = _DRIVER
) -> MachineObservations:
    """All of it; ``driver`` is where the kernel's NVIDIA module says its version."""
    directories: dict[int, Directory] = {}
    accelerators: list[Accelerators | None] = []
    places = writing_places(config)

    async def look_at_disk(number: int, key: str, path: Path) -> None:
        found = await gathering.within(
            DISK_S, f"the disk of {key}", lambda: in_thread(_directory, key, path, abandon_on_cancel=True)
        )
        if found is not None:
            directories[number] = found

    async def look_at_accelerators() -> None:
        accelerators.append(
            await gathering.within(ACCELERATORS_S, "what torch can use", lambda: read_accelerators(driver))
        )

    has: list[DetectedMachine] = []

    async def look_at_resources(work_dir: Path) -> None:
        found = await gathering.within(DISK_S, "what this machine has", lambda: _detected(work_dir))
        has.extend([found] if found is not None else [])

    async with trio.open_nursery() as nursery:
        for number, (key, path) in enumerate(places):
            nursery.start_soon(look_at_disk, number, key, path)
        if isinstance(config, WorkerConfig):
            nursery.start_soon(look_at_resources, config.work_dir)
            if any(one.cmd is None for one in config.executors):
                nursery.start_soon(look_at_accelerators)
    return MachineObservations(
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        receive_buffer=_largest("tcp_rmem"),
        send_buffer=_largest("tcp_wmem"),
        has=has[0] if has else None,
        buffer_shortfalls=() if config is None else tuple(Buffers.of(config.tuning.sockets).shortfalls()),
        versions=await in_thread(versions),
        directories=tuple(directories[number] for number in sorted(directories)),
        accelerators=next(iter(accelerators), None),
    )


async def _detected(work_dir: Path) -> DetectedMachine:
    return await in_thread(detect, work_dir, child_environment(), abandon_on_cancel=True)


def writing_places(config: NodeConfig | None) -> list[tuple[str, Path]]:
    """Key and directory of where a component writes."""
    if isinstance(config, WorkerConfig):
        return [("work_dir", config.work_dir)]
    if isinstance(config, SchedulerConfig):
        output = config.scheduler.job.output
        found = [("state_dir", config.state_dir)]
        return found if "://" in output else [*found, ("scheduler.job.output", Path(output))]
    return []


def _directory(key: str, path: Path) -> Directory:
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return Directory(key, str(path), problem=f"{place} is no directory")
    free = free_bytes(place)
    if not os.access(place, os.W_OK | os.X_OK):
        return Directory(key, str(path), free, problem=f"{place} belongs to another user")
    if free < _LEAST_FREE_BYTES:
        return Directory(key, str(path), free)
    try:
        rate = _write_rate(place)
        # a moment's load is no slow disk
        return Directory(key, str(path), free, rate if rate > _QUICK else max(rate, _write_rate(place)))
    except OSError as exc:
        return Directory(key, str(path), free, problem=exc.strerror or str(exc))


def _write_rate(place: Path) -> float:
    """Bytes a second that reach the disk, of a file that has no name."""
    piece = os.urandom(_MB)
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        began, written = time.monotonic(), 0
        while written < _WRITTEN_BYTES and time.monotonic() - began < _WRITTEN_S:
            written += file.write(piece) or 0
            if written % (8 * _MB) == 0:
                os.fdatasync(file.fileno())
        os.fdatasync(file.fileno())
        return written / max(1e-6, time.monotonic() - began)


def _largest(name: str) -> int | None:
    """The third number of ``tcp_rmem`` or ``tcp_wmem``."""
    try:
        return int((_BUFFERS / name).read_text().split()[2])
    except (OSError, ValueError, IndexError):
        return None


async def read_accelerators(driver: Path = _DRIVER) -> Accelerators:
    """In a child process. Raises HyphaError where that says nothing."""
    run = await trio.run_process(
        [sys.executable, "-m", "hypha.executor.accelerators"],
        capture_stdout=True,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    try:
        found = decode(json.loads, run.stdout)
        return Accelerators(
            driver=await in_thread(_driver_version, driver),
            torch=str(found.get("torch", "")),
            built_for=str(found.get("built_for", "")),
            usable=int(found.get("usable", 0)),
            problem=str(found.get("problem", "")),
        )
    except (Undecodable, AttributeError, TypeError, ValueError) as exc:
        raise HyphaError(f"the child that imports torch ended with exit code {run.returncode}") from exc


def _driver_version(path: Path) -> str:
    """``NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug ...``."""
    try:
        words = path.read_text().split()
    except OSError:
        return ""
    return next((word for word in words if word[:1].isdigit() and word.count(".") >= 1), "")
