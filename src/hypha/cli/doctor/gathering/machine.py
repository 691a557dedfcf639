"""The machine: limits, buffers, disks, versions, GPUs; identity files, datasets and models that lie there."""

from __future__ import annotations

import json
import math
import os
import resource
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import trio

from hypha.cli.doctor.gathered import (
    Accelerators,
    Directory,
    IdentityObservations,
    MachineObservations,
    ServiceObservations,
)
from hypha.cli.doctor.gathering import Gathering, at_once, nothing
from hypha.cli.doctor.subject import own_certificate
from hypha.config.environment import child_environment
from hypha.config.job import JobConfig
from hypha.config.models import DataConfig, DatasetConfig, NodeConfig, SchedulerConfig, WorkerConfig
from hypha.data.manifest import MANIFEST_FILE, load_dataset_directory
from hypha.data.slices import SUFFIX
from hypha.decoding import decode, decode_json
from hypha.errors import DataError, HyphaError, IdentityError, Undecodable
from hypha.net.sockets import buffer_shortfalls
from hypha.pki.identity import Identity, IdentityFiles, load_identity
from hypha.runtime import free_bytes, in_thread
from hypha.telemetry.health import versions
from hypha.worker.limits.detecting import detect

DISK_S = 30.0
ACCELERATORS_S = 60.0
_MB = 1 << 20
#: so much is written at most, for so long at most, and only where so much is free
_WRITTEN_BYTES, _WRITTEN_S, _LEAST_FREE_BYTES = 32 * _MB, 2.0, 256 * _MB
#: bytes a second; what is slower is measured again
_QUICK = 20 * _MB
#: the format's own limit is 100 MB; headers have some kilobytes
_MAX_HEADER_BYTES = 16 << 20
_DRIVER = Path("/proc/driver/nvidia/version")
_BUFFERS = Path("/proc/sys/net/ipv4")


async def gather_machine(
    gathering: Gathering, config: NodeConfig | None, driver: Path = _DRIVER
) -> MachineObservations:
    """All of it; ``driver`` is where the kernel's NVIDIA module says its version."""
    disks = [
        partial(gathering.in_thread, DISK_S, f"the disk of {key}", _directory, key, path)
        for key, path in writing_places(config)
    ]
    resources, torch = nothing, nothing
    if isinstance(config, WorkerConfig):
        arguments = (detect, config.work_dir, child_environment())
        resources = partial(gathering.in_thread, DISK_S, "what this machine has", *arguments)
        if any(one.cmd is None for one in config.executors):
            look = partial(read_accelerators, driver)
            torch = partial(gathering.within, ACCELERATORS_S, "what torch can use", look)
    has, accelerators, *directories = await at_once(resources, torch, *disks)
    return MachineObservations(
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        receive_buffer=_largest("tcp_rmem"),
        send_buffer=_largest("tcp_wmem"),
        has=has,
        buffer_shortfalls=() if config is None else tuple(buffer_shortfalls(config.tuning.sockets)),
        versions=await in_thread(versions),
        directories=tuple(one for one in directories if one is not None),
        accelerators=accelerators,
    )


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
        found = decode_json(run.stdout, Accelerators)
    except Undecodable as exc:
        raise HyphaError(f"the child that imports torch ended with exit code {run.returncode}") from exc
    return replace(found, driver=await in_thread(_driver_version, driver))


def _driver_version(path: Path) -> str:
    """``NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug ...``."""
    try:
        words = path.read_text().split()
    except OSError:
        return ""
    return next((word for word in words if word[:1].isdigit() and word.count(".") >= 1), "")


def gather_identity(files: IdentityFiles) -> tuple[IdentityObservations, Identity | None]:
    """What the files hold, and the identity where a node could be started with it. Blocks for a moment."""
    identity: Identity | None = None
    problems: tuple[tuple[str, str], ...] = ()
    try:
        identity = load_identity(files, warn=False)
    except IdentityError as exc:
        problems = tuple((one.key, f"{one.source}: {one.message}") for one in exc.problems)
    own = own_certificate(files)
    ends = {} if own is None else {"certificate": own.certificate.not_valid_after_utc}
    if identity is not None:
        ends |= identity.expirations()
    mode: int | None = None
    with suppress(OSError):
        mode = stat.S_IMODE(files.key.stat().st_mode)
    observed = IdentityObservations(
        files=files,
        now=datetime.now(UTC),
        peer=identity.peer_id if identity is not None else (own.peer_id or "" if own is not None else ""),
        roles=None if own is None else own.roles,
        key_mode=mode,
        begins=None if own is None else own.certificate.not_valid_before_utc,
        ends=ends,
        problems=problems,
    )
    return observed, identity


def gather_served(config: DataConfig) -> ServiceObservations:
    """Reads manifests and looks for the slices; hashes nothing. Blocks for a moment."""
    entries = [*config.datasets, *([DatasetConfig(path=config.dataset_path)] if config.dataset_path else [])]
    names: list[str] = []
    unusable: list[tuple[str, str]] = []
    for entry in entries:
        try:
            if (entry.path / MANIFEST_FILE).exists():
                names.append(load_dataset_directory(entry.path, entry.name).name)
            elif any(entry.path.glob(f"*{SUFFIX}")):
                # the node makes a manifest when it starts, which takes its time
                names.append(entry.name or entry.path.resolve().name)
            else:
                unusable.append((str(entry.path), f"it holds neither {MANIFEST_FILE} nor any slice"))
        except DataError as exc:
            unusable.append((str(entry.path), "; ".join(str(exc).splitlines())))
    return ServiceObservations(tuple(names), tuple(unusable))


def parameters_of(job: JobConfig) -> int | None:
    """Numbers in all tensors of the model's safetensors files, where its directory is here and has any."""
    if job.model.path is None or not job.model.path.is_dir():
        return None
    count = 0
    for path in job.model.path.glob("*.safetensors"):
        with suppress(OSError, Undecodable, AttributeError, KeyError, TypeError), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: Any = decode(json.loads, file.read(min(size, _MAX_HEADER_BYTES)))
            count += sum(math.prod(one["shape"]) for key, one in header.items() if key != "__metadata__")
    return count or None
