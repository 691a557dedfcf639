"""What this machine has: cores, memory, GPUs and disk, as far as this process may use them.

A container's limits count, and whoever started this process may have pinned it to some cores or hidden some
GPUs from it. :func:`detect` reads (files below :class:`Roots`, and NVIDIA's library), :func:`lowered` is
arithmetic: a configuration may offer less than there is, and never more. Amounts are those of
:class:`hypha.messages.Resources`: cores, and GB of the rest.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from hypha.files.disks import existing, free_bytes
from hypha.messages import Resources
from hypha.worker.limits.cgroups import GB
from hypha.worker.limits.gpus import Gpu, find_gpus

#: more than is there by less than this share is rounding, not a claim
_ROUNDING = 0.01


@dataclass(frozen=True)
class Roots:
    """Where the kernel describes itself."""

    cgroups: Path = Path("/sys/fs/cgroup")
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")


@dataclass(frozen=True)
class DetectedMachine:
    """What was found, and for cores and memory what bounds them: the machine, a cgroup, the affinity."""

    cpu: float
    cpu_by: str
    memory: float
    memory_by: str
    storage: float
    storage_by: str
    gpus: tuple[Gpu, ...] = ()

    @property
    def gpu(self) -> float:
        """GB of all GPUs together."""
        return sum(one.memory_bytes for one in self.gpus) / GB

    @property
    def gpu_known(self) -> bool:
        """False when there are GPUs and the memory of one of them is not known."""
        return all(one.memory_bytes for one in self.gpus)

    @property
    def resources(self) -> Resources:
        """All of it."""
        return Resources(cpu=self.cpu, memory=self.memory, gpu=self.gpu, storage=self.storage)

    def describe(self) -> dict[str, str]:
        """Each resource in words."""
        gpus = f"{', '.join(map(str, self.gpus))}: {self.gpus[0].source}" if self.gpus else "none"
        return {
            "cpu": f"{self.cpu:g} cores: {self.cpu_by}",
            "memory": f"{self.memory:.1f} GB: {self.memory_by}",
            "gpu": gpus,
            "storage": f"{self.storage:.1f} GB: {self.storage_by}",
        }


@dataclass(frozen=True)
class Claim:
    """A configuration asks for more of ``resource`` than there is; ``used`` is taken instead."""

    resource: str
    asked: float
    used: float
    why: str

    def __str__(self) -> str:
        return (
            f"resources.{self.resource} = {self.asked:g} is more than this machine has ({self.why}); "
            f"{self.used:g} is offered instead"
        )


def lowered(configured: Resources, machine: DetectedMachine) -> tuple[Resources, tuple[Claim, ...]]:
    """What may be offered of ``configured`` on ``machine``, and what of it is more than there is.

    GPU memory that the driver does not report is taken from the configuration.
    """
    there, about = machine.resources, machine.describe()
    offered, claims = {}, []
    for name in ("cpu", "memory", "gpu", "storage"):
        asked, most = getattr(configured, name), getattr(there, name)
        unknown = name == "gpu" and not machine.gpu_known
        if asked <= most or unknown:
            offered[name] = asked
            continue
        # rounded down, so that what is offered is there
        offered[name] = most if name == "cpu" else int(most * 10) / 10
        if asked > most * (1 + _ROUNDING):
            claims.append(Claim(name, asked, offered[name], about[name]))
    return Resources(**offered), tuple(claims)


def detect(
    work_dir: Path, environment: Mapping[str, str] | None = None, roots: Roots | None = None
) -> DetectedMachine:
    """All there is, for a process with ``environment``. ``work_dir`` need not exist; what the slice cache in
    it holds counts as free, as it is deleted for other data. Blocks for some milliseconds.
    """
    roots = roots or Roots()
    cpu, cpu_by = _least([_cores(), *_cpu_limits(roots)])
    memory, memory_by = _least([_memory(roots), *_memory_limits(roots)])
    free, held = free_bytes(existing(work_dir)), _held_bytes(work_dir / "cache")
    cached = f", {held / GB:.1f} GB of it held by the slice cache" if held else ""
    return DetectedMachine(
        cpu=cpu,
        cpu_by=cpu_by,
        memory=memory / GB,
        memory_by=memory_by,
        storage=(free + held) / GB,
        storage_by=f"free in work_dir{cached}",
        gpus=find_gpus(environment or {}, roots.proc, roots.sys, memory),
    )


def usable_cores() -> tuple[int, ...]:
    """Numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _least(found: list[tuple[float, str]]) -> tuple[float, str]:
    return min(found, key=lambda one: one[0])


def _cores() -> tuple[float, str]:
    cores, all_ = len(usable_cores()), os.cpu_count() or 1
    if cores < all_:
        return float(cores), f"this process is pinned to {cores} of {all_} cores"
    return float(cores), "all of this machine"


def _memory(roots: Roots) -> tuple[float, str]:
    with contextlib.suppress(OSError, ValueError):
        for line in (roots.proc / "meminfo").read_text().splitlines():
            name, _, amount = line.partition(":")
            if name == "MemTotal":
                return int(amount.split()[0]) * 1024.0, "all of this machine"
    return float(psutil.virtual_memory().total), "all of this machine"


def _held_bytes(cache: Path) -> int:
    """Of the files in it, which other names (links of jobs) do not make more."""
    held = 0
    with contextlib.suppress(OSError), os.scandir(cache) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                held += entry.stat(follow_symlinks=False).st_blocks * 512
    return held


def _cpu_limits(roots: Roots) -> Iterator[tuple[float, str]]:
    """Cores that a quota allows: of cgroup v2 (``cpu.max``) and v1."""
    for group in _chain(roots, "cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota) / int(period), "a quota of this process's cgroup (v2)"
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota_us = int((group / "cpu.cfs_quota_us").read_text())
            if quota_us > 0:
                period_us = int((group / "cpu.cfs_period_us").read_text())
                yield quota_us / period_us, "a quota of this process's cgroup (v1)"


def _memory_limits(roots: Roots) -> Iterator[tuple[float, str]]:
    """Bytes; v1 writes a huge number where there is no limit."""
    for group in _chain(roots, "memory"):
        for name, version in (("memory.max", "v2"), ("memory.limit_in_bytes", "v1")):
            with contextlib.suppress(OSError, ValueError):
                limit = float(int((group / name).read_text()))
                yield limit, f"the limit of this process's cgroup ({version})"


def _chain(roots: Roots, controller: str) -> Iterator[Path]:
    """Directories of the control groups that this process is in, and of those above them."""
    try:
        lines = (roots.proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root = roots.cgroups
        elif controller in controllers.split(","):
            root = roots.cgroups / controller
        else:
            continue
        place = root / path.lstrip("/")
        while place != root and root in place.parents:
            yield place
            place = place.parent
        yield root
