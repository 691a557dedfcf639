"""What this machine has: cores, memory, GPUs and disk, as far as this process may use them.

A container's limits count, and whoever started this process may have pinned it to some cores or hidden some
GPUs from it. :func:`detect` reads (files in /proc and /sys, and NVIDIA's library), :func:`lowered` is
arithmetic: a configuration may offer less than there is, and never more. Amounts are those of
:class:`hypha.messages.Resources`: cores, and GB of the rest.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import psutil

from hypha.files.disks import existing, free_bytes
from hypha.messages import Resources
from hypha.worker.limits.cgroups import GB, Controller, find_cgroups
from hypha.worker.limits.gpus import Gpu, find_gpus
from hypha.worker.limits.usage import disk_usage

#: more than is there by less than this share is rounding, not a claim
_ROUNDING = 0.01
_ALL = "all of this machine"


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
        return Resources(cpu=self.cpu, memory=self.memory, gpu=self.gpu, storage=self.storage)

    def describe(self) -> dict[str, str]:
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
    work_dir: Path, environment: Mapping[str, str] | None = None, root: Path = Path("/")
) -> DetectedMachine:
    """All there is, for a process with ``environment``. ``work_dir`` need not exist; what the slice cache in
    it holds counts as free, as it is deleted for other data. The kernel describes itself below ``root``.
    Blocks for some milliseconds.
    """
    cores, all_ = len(usable_cores()), os.cpu_count() or 1
    cores_by = _ALL if cores >= all_ else f"this process is pinned to {cores} of {all_} cores"
    cpu, cpu_by = min([(float(cores), cores_by), *_cpu_limits(root)], key=itemgetter(0))
    memory, memory_by = min(
        [(float(psutil.virtual_memory().total), _ALL), *_memory_limits(root)], key=itemgetter(0)
    )
    free, held = free_bytes(existing(work_dir)), disk_usage([work_dir / "cache"])
    cached = f", {held / GB:.1f} GB of it held by the slice cache" if held else ""
    return DetectedMachine(
        cpu=cpu,
        cpu_by=cpu_by,
        memory=memory / GB,
        memory_by=memory_by,
        storage=(free + held) / GB,
        storage_by=f"free in work_dir{cached}",
        gpus=find_gpus(environment or {}, root, memory),
    )


def usable_cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _cpu_limits(root: Path) -> Iterator[tuple[float, str]]:
    """Cores that a quota allows: of cgroup v2 (``cpu.max``) and v1."""
    for group in _chain(root, "cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota) / int(period), "a quota of this process's cgroup (v2)"
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota_us = int((group / "cpu.cfs_quota_us").read_text())
            if quota_us > 0:
                period_us = int((group / "cpu.cfs_period_us").read_text())
                yield quota_us / period_us, "a quota of this process's cgroup (v1)"


def _memory_limits(root: Path) -> Iterator[tuple[float, str]]:
    """Bytes; v1 writes a huge number where there is no limit."""
    for group in _chain(root, "memory"):
        for name, version in (("memory.max", "v2"), ("memory.limit_in_bytes", "v1")):
            with contextlib.suppress(OSError, ValueError):
                limit = float(int((group / name).read_text()))
                yield limit, f"the limit of this process's cgroup ({version})"


def _chain(root: Path, controller: Controller) -> Iterator[Path]:
    """Directories of the control groups that this process is in, and those above them."""
    try:
        own = root / "proc" / "self"
        v2, v1 = find_cgroups((own / "mountinfo").read_text(), (own / "cgroup").read_text())
    except (OSError, ValueError):
        return
    for place in (v2, v1.get(controller)):
        if place is not None:
            for group in (place, *place.parents):
                yield root / group.relative_to("/")
