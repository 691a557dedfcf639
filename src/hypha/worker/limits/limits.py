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
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import trio

from hypha.errors import ConfigError, Problem
from hypha.messages import Resources
from hypha.runtime import in_thread, is_simulated
from hypha.telemetry.instruments import LIMITS_EXCEEDED
from hypha.worker.jobs.directory import JobDirectory
from hypha.worker.limits.cgroups import (
    CONTROLLERS,
    GB,
    CgroupPlaces,
    Controller,
    counted,
    make_groups,
    remove_group,
)
from hypha.worker.limits.gpus import VISIBLE, Gpu, GpuShare, gpu_environment
from hypha.worker.limits.quotas import ProjectQuotas
from hypha.worker.limits.usage import CorePins, Excess, Quota, count_tasks, disk_usage, excess
from hypha.worker.processes.keepers import Launch

logger = logging.getLogger(__name__)

Mode = Literal["auto", "cgroup", "rlimit", "none"]

#: of an executor, unless the worker's owner says otherwise; and so many a core where that is more
DEFAULT_PROCESSES, PROCESSES_A_CORE = 512, 64
#: between two looks at what no kernel bounds
LOOK_S = 1.0
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
_NO_GPU = GpuShare()
_LINUX = sys.platform == "linux"


@dataclass(frozen=True)
class Means:
    """What a worker holds its executors to their leases with: ``cores`` hands out cores where no cgroup
    counts their use (without, executors are pinned to none), ``max_processes`` is the owner's own number,
    ``quotas`` are those of the file system of ``work_dir``.
    """

    mode: Mode = "auto"
    cgroups: CgroupPlaces = field(default_factory=dict)
    max_processes: int | None = None
    gpus: tuple[Gpu, ...] = ()
    cores: CorePins | None = None
    quotas: ProjectQuotas | None = None

    def version(self, controller: Controller) -> str | None:
        """``v1`` or ``v2`` where a cgroup bounds what ``controller`` counts; None: another means does."""
        used = controller in self.cgroups and self.mode in ("auto", "cgroup")
        return self.cgroups[controller][0] if used else None


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
    return "memory" in places and "cpu" in places


def most_processes(cpu: float, wanted: int | None) -> int:
    """How many processes and threads an executor with ``cpu`` cores may have; 0: any number."""
    if wanted is not None:
        return wanted
    return max(DEFAULT_PROCESSES, PROCESSES_A_CORE * math.ceil(cpu))


def mechanisms(means: Means, cache_gb: float) -> dict[str, str]:
    """By what each resource is enforced on this machine, in words."""
    gpus = means.gpus
    gpu = VISIBLE.get(gpus[0].vendor, "the one GPU is everybody's") if gpus else "there are none"
    cache = f"the worker lets go of slices at {cache_gb:g} GB"
    if means.mode == "none":
        nothing = 'not enforced: limits.enforce = "none"'
        return dict.fromkeys(("memory", "cores", "processes", "disk"), nothing) | {
            "gpus": gpu,
            "cache": cache,
        }
    watched = f"watched by the worker every {LOOK_S:g} s"
    without: dict[Controller, str] = {
        "memory": "RLIMIT_DATA of each process" if _LINUX else "not enforced: no cgroups and no Linux here",
        "cpu": "affinity and thread counts" if _LINUX else "thread counts",
        "pids": watched if _LINUX else "not enforced: no cgroups and no Linux here",
    }
    found = {
        controller: f"cgroup {version} ({_FILES[controller, version]})"
        if (version := means.version(controller)) is not None
        else without[controller]
        for controller in CONTROLLERS
    }
    return {
        "memory": found["memory"],
        "cores": found["cpu"],
        "processes": found["pids"],
        "gpus": f"{gpu}; memory by the cap of torch" if gpus else gpu,
        "disk": watched if means.quotas is None else f"project quota ({means.quotas.kind})",
        "cache": cache,
    }


class Limits:
    """Everything that holds one executor to its lease of ``resources``, with ``gpus`` and ``directory``: in
    force before it starts, with cgroups called ``name``, until :meth:`remove`, when its processes are gone.
    :attr:`excess` tells what it was ended, or denied something, for. Raises :class:`ConfigError` when the
    configuration insists on cgroups and there are none.
    """

    def __init__(
        self,
        means: Means,
        name: str,
        resources: Resources,
        gpus: GpuShare = _NO_GPU,
        directory: JobDirectory | None = None,
    ) -> None:
        self._means = means
        self._gpus = gpus
        self._directory = directory
        self._keeper: int | None = None
        self.excess: Excess | None = None
        #: what tells its libraries how many threads to use
        self.threads: dict[str, str] = {}
        self.groups: tuple[Path, ...] = ()
        self.rlimits: tuple[tuple[str, int], ...] = ()
        self.cores: tuple[int, ...] = ()
        self._core_locks: dict[int, int] = {}
        #: what the worker watches itself
        self.quota = Quota()
        #: of the file system's own quota, the number there
        self._project: int | None = None
        self.description = "no limits: switched off by configuration"
        if means.mode != "none":
            self.description = self._apply(name, resources)

    def _apply(self, name: str, resources: Resources) -> str:
        """What is in force, in words."""
        means = self._means
        if means.mode == "cgroup" and not suffice(means.cgroups):
            raise no_cgroups()
        processes = most_processes(resources.cpu, means.max_processes)
        try:
            if means.mode != "rlimit":
                self.groups = make_groups(means.cgroups, name, resources, processes)
        except OSError as exc:
            if means.mode == "cgroup":
                raise no_cgroups() from exc
            logger.warning("Cannot make cgroup %s: %s", name, exc)
            means = replace(means, cgroups={})
        size_bytes = int(resources.storage * GB)
        if means.quotas is not None and self._directory is not None and size_bytes:
            try:
                self._project = means.quotas.bound(self._directory.bounded, size_bytes)
            except OSError as exc:
                logger.warning("The job directory is watched, as it can have no project quota: %s", exc)
                means = replace(means, quotas=None)
        if resources.memory and means.version("memory") is None and _LINUX:
            # RLIMIT_DATA counts private writable memory; RLIMIT_AS would also count CUDA's and torch's
            # large reservations of mere address space.
            self.rlimits = (("RLIMIT_DATA", int(resources.memory * GB)),)
        if resources.cpu:
            self.threads = thread_environment(max(1, math.floor(resources.cpu)))
            if means.version("cpu") is None and means.cores is not None:
                self._core_locks = means.cores.pin(resources.cpu)
                self.cores = tuple(sorted(self._core_locks))
        self.quota = Quota(size_bytes, processes if means.version("pids") is None and _LINUX else 0)
        by = mechanisms(means, 0.0)
        pinned = f" ({','.join(map(str, self.cores))})" if self.cores else ""
        parts = {
            "memory": (resources.memory, "GB memory"),
            "cores": (resources.cpu, f"cores{pinned}"),
            "processes": (processes, "processes"),
            "disk": (resources.storage, "GB in its directory"),
        }
        said = [f"{amount:g} {what}: {by[part]}" for part, (amount, what) in parts.items() if amount]
        return ", ".join(said) or "no limits: the lease reserves nothing that can be enforced"

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """``inherited``, and what tells the executor how much it has."""
        capped = self._means.mode != "none"
        return gpu_environment(self._means.gpus, self._gpus, inherited, capped) | self.threads

    def launch(self, launch: Launch) -> Launch:
        """``launch``, whose keeper applies the kernel's part, before its child becomes the executor."""
        options = [*launch.keeper_options]
        for group in self.groups:
            options += ["--cgroup", str(group / "cgroup.procs")]
        for name, amount in self.rlimits:
            options += ["--rlimit", f"{name}={amount}"]
        if self.cores:
            options += ["--cores", ",".join(map(str, self.cores))]

        def started(keeper: int) -> None:
            self._keeper = keeper

        return replace(launch, keeper_options=tuple(options), on_start=started)

    async def watch(self, exceeded: Callable[[Excess], None]) -> None:
        """Look at what no kernel bounds, and report when it is too much; no simulated executor has that."""
        if is_simulated() or self._directory is None:
            return
        places, shared = self._directory.occupied, self._directory.part("slices")
        while self.quota and self.excess is None:
            await trio.sleep(LOOK_S)
            disk = tasks = 0
            if self.quota.disk_bytes:
                disk = await in_thread(disk_usage, places, shared, abandon_on_cancel=True)
            if self.quota.processes and self._keeper is not None:
                tasks = await in_thread(count_tasks, self._keeper, abandon_on_cancel=True)
            self.excess = excess(self.quota, disk, tasks)
        if self.excess is not None:
            exceeded(self.excess)

    def judge(self, failed: bool) -> None:
        """It has ended; where it ``failed``, nobody knows why: was it denied something? Counts excesses."""
        if self.excess is None and failed:
            self.excess = self.denied()
        if self.excess is not None:
            LIMITS_EXCEEDED.add(resource=self.excess.resource)

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
        if self._means.quotas is not None and self._project is not None:
            most = self.quota.disk_bytes
            if (used := self._means.quotas.used_bytes(self._project)) >= _FULL * most:
                return excess(Quota(most), max(used, most + 1), 0)
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
        while self._core_locks:
            os.close(self._core_locks.popitem()[1])
        if self._means.quotas is not None and self._project is not None:
            self._means.quotas.release(self._project)
        for group in self.groups:
            await remove_group(group)
