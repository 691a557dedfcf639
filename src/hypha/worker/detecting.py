"""What this machine has: cores, memory, GPU memory and disk, as far as this process may use them.

A container's limits count, and whoever started this process may have pinned it to some cores. Amounts are
those of :class:`hypha.messages.Resources`: cores, and GB of the rest.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from hypha.messages import Resources
from hypha.telemetry.resources import read_gpus
from hypha.worker.limits import GB

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def detect(work_dir: Path, groups: Path = _CGROUPS, own: Path = _OWN) -> Resources:
    """All there is. ``work_dir`` need not exist; blocks for some milliseconds."""
    return Resources(
        cpu=min([float(len(os.sched_getaffinity(0))), *_cpu_limits(groups, own)]),
        memory=min([float(psutil.virtual_memory().total), *_memory_limits(groups, own)]) / GB,
        gpu=sum(one.total_bytes for one in read_gpus()) / GB,
        storage=_free_bytes(work_dir) / GB,
    )


def _free_bytes(directory: Path) -> int:
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def _cpu_limits(groups: Path, own: Path) -> Iterator[float]:
    """Cores that a quota allows: of cgroup v2 (``cpu.max``) and v1."""
    for group in _chain(groups, own, "cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota_us = int((group / "cpu.cfs_quota_us").read_text())
            if quota_us > 0:
                yield quota_us / int((group / "cpu.cfs_period_us").read_text())


def _memory_limits(groups: Path, own: Path) -> Iterator[float]:
    """Bytes; v1 writes a huge number where there is no limit."""
    for group in _chain(groups, own, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                yield float(int((group / name).read_text()))


def _chain(groups: Path, own: Path, controller: str) -> Iterator[Path]:
    """Directories of the control groups that this process is in, and of those above them."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root = groups
        elif controller in controllers.split(","):
            root = groups / controller
        else:
            continue
        place = root / path.lstrip("/")
        while place != root and root in place.parents:
            yield place
            place = place.parent
        yield root
