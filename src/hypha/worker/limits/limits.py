"""Holding an executor to what its lease reserved, with the strongest means this machine has.

Each resource by itself: memory, cores and the number of processes by cgroups (v2, or v1 where only that has
the controller); else memory by a resource limit of each process, cores by affinity, processes and disk by the
worker's own look at them (:mod:`hypha.worker.limits.usage`). Thread counts are set in any case, so that
numeric libraries do not start a thread a core of a machine they have two cores of. An amount of 0 in the
lease means that it was not limited, and nothing is enforced. :func:`mechanisms` says what is in force.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from hypha.errors import ConfigError, Problem
from hypha.messages import Resources
from hypha.runtime import is_simulated
from hypha.telemetry.instruments import LIMITS_EXCEEDED
from hypha.worker.jobs.directory import JobDirectory
from hypha.worker.limits.cgroups import GB, CgroupPlaces, counted, make_groups, remove_group
from hypha.worker.limits.gpus import VISIBLE, Gpu, GpuShare, gpu_environment
from hypha.worker.limits.quotas import ProjectQuotas
from hypha.worker.limits.usage import LOOK_S, CorePins, Excess, Quota, excess, keep_within
from hypha.worker.processes.keepers import Launch

logger = logging.getLogger(__name__)

Mode = Literal["auto", "cgroup", "rlimit", "none"]

#: of an executor, unless the worker's owner says otherwise; and so many a core where that is more
DEFAULT_PROCESSES, PROCESSES_A_CORE = 512, 64
#: whoever was refused more than this share of a quota has filled it
_FULL = 0.99
#: how the kernel calls the bound, for those who look for it
_FILES = {
    ("memory", "v2"): "memory.max",
    ("memory", "v1"): "memory.limit_in_bytes",
    ("cpu", "v2"): "cpu.max",
    ("cpu", "v1"): "cpu.cfs_quota_us",
    ("pids", "v2"): "pids.max",
    ("pids", "v1"): "pids.max",
}
_LINUX = sys.platform == "linux"


@dataclass
class Limits:
    """What is in force for one executor. ``groups`` are cgroup directories made for it, which
    :meth:`remove` deletes once its processes are gone; ``quota`` is what the worker watches itself.
    """

    description: str
    environment: dict[str, str] = field(default_factory=dict)
    groups: tuple[Path, ...] = ()
    rlimits: tuple[tuple[str, int], ...] = ()
    cores: tuple[int, ...] = ()
    quota: Quota = field(default_factory=Quota)
    pins: CorePins | None = None
    #: the file system's own quota, and its number there
    project: tuple[ProjectQuotas, int] | None = None

    def launch_options(self) -> list[str]:
        """For :mod:`hypha.processes.keeper`, which applies them before the child becomes the executor."""
        options = []
        for group in self.groups:
            options += ["--cgroup", str(group / "cgroup.procs")]
        for name, amount in self.rlimits:
            options += ["--rlimit", f"{name}={amount}"]
        if self.cores:
            options += ["--cores", ",".join(map(str, self.cores))]
        return options

    def denied(self) -> Excess | None:
        """What these cgroups have denied the executor, in words that say what helps. One that was killed by
        anybody else is not reported as one that it was for want of memory.
        """
        for group in self.groups:
            # v2 and v1 give the file other names and write the same line
            if any(counted(group, file, "oom_kill") for file in ("memory.events", "memory.oom_control")):
                return Excess(
                    "oom",
                    f"the kernel killed it for want of memory (its limits: {self.description}); the job's "
                    "resources.worker.memory, or resources.parameter_server.memory, may be too low",
                    "memory",
                )
        if self.project is not None and self.quota.disk_bytes:
            quotas, number = self.project
            if (used := quotas.used_bytes(number)) >= _FULL * self.quota.disk_bytes:
                return excess(Quota(self.quota.disk_bytes), max(used, self.quota.disk_bytes + 1), 0)
        for group in self.groups:
            if times := counted(group, "pids.events", "max"):
                return Excess(
                    "internal",
                    f"it was refused another process or thread {times} times (its limits: "
                    f"{self.description}); if it needs so many, set its worker's limits.max_processes higher",
                    "processes",
                )
        return None

    async def remove(self) -> None:
        if self.pins is not None:
            self.pins.release(self.cores)
        if self.project is not None:
            quotas, number = self.project
            quotas.release(number)
        for group in self.groups:
            await remove_group(group)


def thread_environment(count: int) -> dict[str, str]:
    """What tells an executor's libraries to use so many threads each."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return dict.fromkeys((*names, "VECLIB_MAXIMUM_THREADS", "RAYON_NUM_THREADS"), str(count))


def no_cgroups() -> ConfigError:
    """For a configuration that insists on what this machine lacks."""
    message = (
        "no writable cgroup with the memory and cpu controllers here; delegate one (systemd: Delegate=yes), "
        'or set limits.enforce = "auto"'
    )
    return ConfigError([Problem("limits.enforce", message)])


def suffice(places: CgroupPlaces) -> bool:
    """Whether a configuration that insists on cgroups has what it insists on."""
    return None not in (places.version("memory"), places.version("cpu"))


def most_processes(cpu: float, wanted: int | None) -> int:
    """How many processes and threads an executor with ``cpu`` cores may have; 0: any number."""
    if wanted is not None:
        return wanted
    return max(DEFAULT_PROCESSES, PROCESSES_A_CORE * math.ceil(cpu))


def mechanisms(means: Means, cache_gb: float) -> dict[str, str]:
    """By what each resource is enforced on this machine, in words."""
    mode, gpus = means.mode, means.gpus
    gpu = VISIBLE.get(gpus[0].vendor, "the one GPU is everybody's") if gpus else "there are none"
    cache = f"the worker lets go of slices at {cache_gb:g} GB"
    if mode == "none":
        nothing = 'not enforced: limits = "none"'
        return dict.fromkeys(("memory", "cores", "processes", "disk"), nothing) | {
            "gpus": gpu,
            "cache": cache,
        }
    watched = f"watched by the worker every {LOOK_S:g} s"
    without = {
        "memory": "RLIMIT_DATA of each process" if _LINUX else "not enforced: no cgroups and no Linux here",
        "cpu": "affinity and thread counts" if _LINUX else "thread counts",
        "pids": watched if _LINUX else "not enforced: no cgroups and no Linux here",
    }
    found = {
        controller: without[controller]
        if mode == "rlimit" or (version := means.cgroups.version(controller)) is None
        else f"cgroup {version} ({_FILES[controller, version]})"
        for controller in ("memory", "cpu", "pids")
    }
    return {
        "memory": found["memory"],
        "cores": found["cpu"],
        "processes": found["pids"],
        "gpus": f"{gpu}; memory by the cap of torch" if gpus else gpu,
        "disk": watched if means.quotas is None else f"project quota ({means.quotas.volume.kind})",
        "cache": cache,
    }


def _bound(
    quotas: ProjectQuotas | None, directories: Sequence[Path], size_bytes: int
) -> tuple[ProjectQuotas, int] | None:
    if quotas is None:
        return None
    try:
        return quotas, quotas.bound(directories, size_bytes)
    except OSError as exc:
        logger.warning("The job directory is watched, as it can have no project quota: %s", exc)
        return None


@dataclass(frozen=True)
class Means:
    """What a worker holds its executors to their leases with: ``cores`` hands out cores where no cgroup
    counts their use (without, executors are pinned to none), ``max_processes`` is the owner's own number,
    ``quotas`` are those of the file system of ``work_dir``.
    """

    mode: Mode = "auto"
    cgroups: CgroupPlaces = field(default_factory=CgroupPlaces)
    max_processes: int | None = None
    gpus: tuple[Gpu, ...] = ()
    cores: CorePins | None = None
    quotas: ProjectQuotas | None = None


def apply_limits(means: Means, name: str, resources: Resources, directories: Sequence[Path] = ()) -> Limits:
    """Limits for an executor under ``resources``; ``name`` names its cgroups. What comes into ``directories``
    is bounded by a quota where there are quotas.

    Raises :class:`ConfigError` when the configuration insists on cgroups and there are none.
    """
    mode, places, cores = means.mode, means.cgroups, means.cores
    if mode == "none":
        return Limits(description="no limits: switched off by configuration")
    if mode == "cgroup" and not suffice(places):
        raise no_cgroups()
    processes = most_processes(resources.cpu, means.max_processes)
    if mode == "rlimit":
        places = CgroupPlaces()
    try:
        groups = make_groups(places, name, resources, processes)
    except OSError as exc:
        if mode == "cgroup":
            raise no_cgroups() from exc
        logger.warning("Cannot make cgroup %s: %s", name, exc)
        groups, places = (), CgroupPlaces()
    threads = thread_environment(max(1, math.floor(resources.cpu))) if resources.cpu else {}
    limits = Limits("", threads, groups)
    parts: list[str] = []
    if resources.memory:
        if version := places.version("memory"):
            parts.append(f"{resources.memory:g} GB memory by cgroup {version}")
        elif _LINUX:
            # RLIMIT_DATA counts private writable memory; RLIMIT_AS would also count CUDA's and torch's
            # large reservations of mere address space.
            limits.rlimits = (("RLIMIT_DATA", int(resources.memory * GB)),)
            parts.append(f"{resources.memory:g} GB memory of each process by a resource limit")
    if resources.cpu:
        if version := places.version("cpu"):
            parts.append(f"{resources.cpu:g} cores by cgroup {version}")
        else:
            limits.pins, limits.cores = cores, cores.pin(resources.cpu) if cores is not None else ()
            by = f"affinity ({','.join(map(str, limits.cores))}) and thread counts" if limits.cores else ""
            parts.append(f"{resources.cpu:g} cores by {by or 'thread counts'}")
    watched = 0
    if processes:
        if version := places.version("pids"):
            parts.append(f"{processes} processes by cgroup {version}")
        elif _LINUX:
            watched = processes
            parts.append(f"{processes} processes, watched")
    if resources.storage:
        limits.project = _bound(means.quotas, directories, int(resources.storage * GB))
        by = "watched" if limits.project is None else "by a project quota"
        parts.append(f"{resources.storage:g} GB in its directory, {by}")
    limits.quota = Quota(int(resources.storage * GB), watched)
    limits.description = ", ".join(parts) or "no limits: the lease reserves nothing that can be enforced"
    return limits


class Confined:
    """Everything that holds one executor to its lease of ``resources``, with ``gpus`` and ``directory``: made
    before it starts; its :attr:`limits`, whose cgroups are called ``name``, are removed when it has ended.
    :attr:`excess` tells what it was ended, or denied something, for. Raises :class:`ConfigError` when the
    configuration insists on cgroups and there are none.
    """

    def __init__(
        self, means: Means, name: str, resources: Resources, gpus: GpuShare, directory: JobDirectory
    ) -> None:
        self.limits = apply_limits(means, name, resources, directory.bounded)
        self._means = means
        self._gpus = gpus
        self._directory = directory
        self._keeper: int | None = None
        self.excess: Excess | None = None

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """``inherited``, and what tells the executor how much it has."""
        capped = self._means.mode != "none"
        return gpu_environment(self._means.gpus, self._gpus, inherited, capped) | self.limits.environment

    def launch(self, launch: Launch) -> Launch:
        """``launch``, whose keeper applies the kernel's part."""
        return replace(
            launch,
            keeper_options=(*launch.keeper_options, *self.limits.launch_options()),
            on_start=self._started,
        )

    def _started(self, keeper: int) -> None:
        self._keeper = keeper

    async def watch(self, exceeded: Callable[[Excess], None]) -> None:
        """Look at what no kernel bounds, and report when it is too much; no simulated executor has that."""
        if is_simulated():
            return
        places, shared = self._directory.occupied, self._directory.part("slices")
        found = await keep_within(self.limits.quota, places, shared, lambda: self._keeper)
        if found is not None:
            self.excess = found
            exceeded(found)

    def judge(self, failed: bool) -> None:
        """It has ended; where it ``failed``, nobody knows why: was it denied something? Counts excesses."""
        if self.excess is None and failed:
            self.excess = self.limits.denied()
        if self.excess is not None:
            LIMITS_EXCEEDED.add(resource=self.excess.resource)
