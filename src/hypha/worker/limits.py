"""Holding an executor to what its lease reserved, with the strongest means this machine has.

cgroup v2, or v1 where only that has the controllers, bound memory and CPU of the whole process tree;
resource limits bound the memory of each process only; thread counts are set in either case, so that
numeric libraries do not start a thread a core of a machine they have two cores of. An amount of 0 in the
lease means that nothing was said about it, and nothing is enforced.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import trio

from hypha.errors import ConfigError, Problem
from hypha.messages import Resources

logger = logging.getLogger(__name__)

GB = 10**9
CPU_PERIOD_US = 100_000

Mode = Literal["auto", "cgroup", "rlimit", "none"]


@dataclass
class Limits:
    """What is in force for one executor. ``groups`` are cgroup directories made for it, which
    :meth:`remove` deletes once its processes are gone.
    """

    description: str
    environment: dict[str, str] = field(default_factory=dict)
    groups: tuple[Path, ...] = ()
    rlimits: tuple[tuple[str, int], ...] = ()

    def launch_options(self) -> list[str]:
        """For :mod:`hypha.keeper`, which applies them in the child before it becomes the executor."""
        options = []
        for group in self.groups:
            options += ["--cgroup", str(group / "cgroup.procs")]
        for name, amount in self.rlimits:
            options += ["--rlimit", f"{name}={amount}"]
        return options

    def verdict(self) -> str:
        """What the kernel did for want of memory in these cgroups, and what helps; empty when nothing."""
        # v2 and v1 give the file other names and write the same line
        for group in self.groups:
            for name in ("memory.events", "memory.oom_control"):
                with contextlib.suppress(OSError, ValueError):
                    for line in (group / name).read_text().splitlines():
                        what, _, count = line.partition(" ")
                        if what == "oom_kill" and int(count):
                            return (
                                f"the kernel killed it for want of memory (its limits: {self.description}); "
                                "the job's resources.worker.memory, or resources.parameter_server.memory, "
                                "may be too low"
                            )
        return ""

    async def remove(self) -> None:
        """Delete the cgroups. The kernel needs a moment after the last process has gone."""
        for group in self.groups:
            for _ in range(100):
                try:
                    group.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    _kill_group(group)
                    await trio.sleep(0.02)
            else:
                logger.warning("Cannot remove cgroup %s: it still has processes.", group)


def _kill_group(group: Path) -> None:
    """Whoever is in it still, wherever it has hidden from its keeper."""
    with contextlib.suppress(OSError):
        (group / "cgroup.kill").write_text("1")
        return
    # v1 has no such file, nor has an old v2
    with contextlib.suppress(OSError):
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@dataclass(frozen=True)
class CgroupPlaces:
    """Where this process may make cgroups: ``v2`` holds every controller, ``v1`` one each."""

    v2: Path | None = None
    v1: Mapping[str, Path] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.v2 is not None or bool(self.v1)


def find_cgroups(mountinfo: str, membership: str) -> tuple[Path | None, dict[str, Path]]:
    """This process's cgroup directories, v2 and v1 by controller, from the texts of
    ``/proc/self/mountinfo`` and ``/proc/self/cgroup``.
    """
    own = {}
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            own[controller] = path
    v2: Path | None = None
    v1: dict[str, Path] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        root, mount_point = before.split(" ")[3:5]
        kind, _, options = after.split(" ", 2)
        for controller in [""] if kind == "cgroup2" else options.split(",") if kind == "cgroup" else []:
            if controller not in own:
                continue
            # Inside a container the mount shows a part of the tree; the path counts from the tree's root.
            relative = os.path.relpath(own[controller], root)
            relative = "." if relative.startswith("..") else relative
            place = Path(os.path.normpath(os.path.join(mount_point, relative)))
            if kind == "cgroup2":
                v2 = v2 or place
            elif controller in ("memory", "cpu"):
                v1.setdefault(controller, place)
    return v2, v1


def _make_v2_usable(place: Path) -> bool:
    """Give children of ``place`` the memory and cpu controllers. A cgroup with processes of its own
    cannot (but for the root), so when this worker is the only one, it moves into a leaf first.
    """
    wanted = {"memory", "cpu"}
    try:
        if not wanted <= set((place / "cgroup.controllers").read_text().split()):
            return False
        if wanted <= set((place / "cgroup.subtree_control").read_text().split()):
            return os.access(place, os.W_OK)
        if (place / "cgroup.procs").read_text().split() == [str(os.getpid())]:
            leaf = place / "hypha-worker"
            leaf.mkdir(exist_ok=True)
            (leaf / "cgroup.procs").write_text(str(os.getpid()))
        (place / "cgroup.subtree_control").write_text("+memory +cpu")
    except OSError:
        return False
    return True


def usable_cgroups() -> CgroupPlaces:
    """What this worker can use here; looked at once, when it starts."""
    try:
        v2, v1 = find_cgroups(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    except (OSError, ValueError):
        return CgroupPlaces()
    if v2 is not None and _make_v2_usable(v2):
        return CgroupPlaces(v2=v2)
    # The owner of a file may write to it whatever its mode says, so only trying tells.
    usable = {}
    for controller, place in v1.items():
        probe = place / f"hypha-probe-{os.getpid()}"
        with contextlib.suppress(OSError):
            probe.mkdir()
            probe.rmdir()
            usable[controller] = place
    return CgroupPlaces(v1=usable)


def _write_group(group: Path, settings: Mapping[str, str]) -> Path:
    group.mkdir()
    try:
        for name, value in settings.items():
            (group / name).write_text(value)
    except OSError:
        group.rmdir()
        raise
    return group


def _make_groups(places: CgroupPlaces, name: str, resources: Resources) -> tuple[Path, ...]:
    memory = str(int(resources.memory * GB))
    quota = str(int(resources.cpu * CPU_PERIOD_US))
    if places.v2 is not None:
        settings: dict[str, str] = {}
        if resources.memory:
            settings |= {"memory.max": memory, "memory.oom.group": "1"}
        if resources.cpu:
            settings["cpu.max"] = f"{quota} {CPU_PERIOD_US}"
        group = _write_group(places.v2 / name, settings)
        # An executor that swaps slows down everybody; kernels without swap accounting lack the file.
        with contextlib.suppress(OSError):
            (group / "memory.swap.max").write_text("0")
        return (group,)
    groups: list[Path] = []
    try:
        if resources.memory and "memory" in places.v1:
            groups.append(_write_group(places.v1["memory"] / name, {"memory.limit_in_bytes": memory}))
        if resources.cpu and "cpu" in places.v1:
            settings = {"cpu.cfs_period_us": str(CPU_PERIOD_US), "cpu.cfs_quota_us": quota}
            groups.append(_write_group(places.v1["cpu"] / name, settings))
    except OSError:
        for group in groups:
            group.rmdir()
        raise
    return tuple(groups)


def _threads(resources: Resources) -> dict[str, str]:
    if not resources.cpu:
        return {}
    return thread_environment(max(1, math.floor(resources.cpu)))


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


def apply_limits(mode: Mode, places: CgroupPlaces, name: str, resources: Resources) -> Limits:
    """Limits for an executor under ``resources``; ``name`` names its cgroups.

    Raises :class:`ConfigError` when the configuration insists on cgroups and there are none.
    """
    if mode == "none":
        return Limits(description="no limits: switched off by configuration")
    bounded = (
        f"{resources.memory:g} GB memory, {resources.cpu:g} cores"
        if resources.cpu or resources.memory
        else ""
    )
    if not bounded:
        return Limits(description="no limits: the lease reserves neither memory nor cores")
    threads = _threads(resources)
    if mode in ("auto", "cgroup") and places:
        try:
            groups = _make_groups(places, name, resources)
        except OSError as exc:
            logger.warning("Cannot make cgroup %s: %s", name, exc)
        else:
            version = "v2" if places.v2 is not None else "v1"
            return Limits(f"cgroup {version}: {bounded}", threads, groups)
    if mode == "cgroup":
        raise no_cgroups()
    rlimits: tuple[tuple[str, int], ...] = ()
    if resources.memory and sys.platform == "linux":
        # RLIMIT_DATA counts private writable memory; RLIMIT_AS would also count CUDA's and torch's
        # large reservations of mere address space.
        rlimits = (("RLIMIT_DATA", int(resources.memory * GB)),)
    return Limits(f"resource limits for each process, and thread counts: {bounded}", threads, rlimits=rlimits)
