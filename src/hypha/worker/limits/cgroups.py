"""Control groups for executors: where this worker may make them, of which controllers, what they say.

v2 where its hierarchy was delegated to this worker, else v1, whose controllers have a hierarchy each. Each
controller is looked for by itself: a machine may delegate memory and not cores.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import trio

from hypha.messages import Resources
from hypha.runtime import wall_time

logger = logging.getLogger(__name__)

GB = 10**9
CPU_PERIOD_US = 100_000
#: the kernel takes no less
_LEAST_QUOTA_US = 1000
#: of a core, in v1 and in v2: what the kernel gives for whom nothing was set
_SHARES_V1, _WEIGHT_V2 = 1024, 100

Controller = Literal["memory", "cpu", "pids"]
CONTROLLERS: tuple[Controller, ...] = ("memory", "cpu", "pids")
#: Groups of executors are called so.
PREFIX = "hypha-"
#: An empty group that is older than this belongs to nobody: its worker was killed.
_STALE_S = 600.0


@dataclass(frozen=True)
class CgroupPlaces:
    """Where this process may make cgroups: ``v2`` holds the controllers ``v2_has``, ``v1`` one each."""

    v2: Path | None = None
    v1: Mapping[str, Path] = field(default_factory=dict)
    v2_has: frozenset[str] = frozenset({"memory", "cpu"})

    def version(self, controller: Controller) -> str | None:
        """``v2`` or ``v1``; None where there is no such controller."""
        if self.v2 is not None and controller in self.v2_has:
            return "v2"
        return "v1" if controller in self.v1 else None


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
            elif controller in CONTROLLERS:
                v1.setdefault(controller, place)
    return v2, v1


def usable_v2(place: Path) -> frozenset[str]:
    """The controllers that children of ``place`` have, once they were given all that there are. A cgroup with
    processes of its own cannot give any (but for the root), so when this worker is the only one, it moves
    into a leaf first.
    """
    try:
        there = set(CONTROLLERS) & set((place / "cgroup.controllers").read_text().split())
        given = set((place / "cgroup.subtree_control").read_text().split())
        if there - given:
            if (place / "cgroup.procs").read_text().split() == [str(os.getpid())]:
                leaf = place / "hypha-worker"
                leaf.mkdir(exist_ok=True)
                (leaf / "cgroup.procs").write_text(str(os.getpid()))
            (place / "cgroup.subtree_control").write_text(
                " ".join(f"+{one}" for one in sorted(there - given))
            )
    except OSError:
        return frozenset()
    return frozenset(there) if there and os.access(place, os.W_OK) else frozenset()


def usable_cgroups() -> CgroupPlaces:
    """What this worker can use here; looked at once, when it starts."""
    try:
        v2, v1 = find_cgroups(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    except (OSError, ValueError):
        return CgroupPlaces()
    has = frozenset[str]() if v2 is None else usable_v2(v2)
    # The owner of a file may write to it whatever its mode says, so only trying tells.
    usable = {}
    for controller, place in v1.items():
        if controller in has:
            continue
        probe = place / f"hypha-probe-{os.getpid()}"
        with contextlib.suppress(OSError):
            probe.mkdir()
            probe.rmdir()
            usable[controller] = place
    return CgroupPlaces(v2=v2 if has else None, v1=usable, v2_has=has)


def remove_stale_groups(places: CgroupPlaces) -> int:
    """Remove empty groups that workers which were killed have left behind; how many."""
    removed = 0
    for place in {*places.v1.values(), *([places.v2] if places.v2 is not None else [])}:
        for group in place.glob(f"{PREFIX}*"):
            # a group that has processes, or children, cannot be removed
            with contextlib.suppress(OSError):
                if wall_time() - group.stat().st_mtime > _STALE_S and not group.name.endswith("-worker"):
                    group.rmdir()
                    removed += 1
    return removed


def make_groups(places: CgroupPlaces, name: str, resources: Resources, processes: int) -> tuple[Path, ...]:
    """Groups called ``name`` that bound the cores and memory of ``resources``, and ``processes`` with their
    threads, as far as there are controllers; 0 is no bound. Raises OSError.
    """
    made: list[Path] = []
    try:
        if places.v2 is not None and (settings := _settings_v2(places, resources, processes)):
            made.append(_write_group(places.v2 / name, *settings))
        for controller, place in places.v1.items():
            if settings := _settings_v1(controller, resources, processes):
                made.append(_write_group(place / name, *settings))
    except OSError:
        for group in made:
            group.rmdir()
        raise
    return tuple(made)


Settings = tuple[dict[str, str], dict[str, str]]


def _settings_v2(places: CgroupPlaces, resources: Resources, processes: int) -> Settings | None:
    """What must be written, and what not every kernel has."""
    must: dict[str, str] = {}
    may: dict[str, str] = {}
    if resources.memory and "memory" in places.v2_has:
        must |= {"memory.max": str(int(resources.memory * GB)), "memory.oom.group": "1"}
        # An executor that swaps slows down everybody; kernels without swap accounting lack the file.
        may["memory.swap.max"] = "0"
    if resources.cpu and "cpu" in places.v2_has:
        must["cpu.max"] = f"{_quota_us(resources.cpu)} {CPU_PERIOD_US}"
        # where more is leased than there is (several workers on a machine), each gets its share
        may["cpu.weight"] = str(min(10_000, max(1, round(resources.cpu * _WEIGHT_V2))))
    if processes and "pids" in places.v2_has:
        must["pids.max"] = str(processes)
    return (must, may) if must else None


def _settings_v1(controller: str, resources: Resources, processes: int) -> Settings | None:
    if controller == "memory" and resources.memory:
        limit = str(int(resources.memory * GB))
        return {"memory.limit_in_bytes": limit}, {"memory.memsw.limit_in_bytes": limit}
    if controller == "cpu" and resources.cpu:
        return (
            {"cpu.cfs_period_us": str(CPU_PERIOD_US), "cpu.cfs_quota_us": str(_quota_us(resources.cpu))},
            {"cpu.shares": str(max(2, round(resources.cpu * _SHARES_V1)))},
        )
    if controller == "pids" and processes:
        return {"pids.max": str(processes)}, {}
    return None


def _quota_us(cpu: float) -> int:
    return max(_LEAST_QUOTA_US, int(cpu * CPU_PERIOD_US))


def _write_group(group: Path, must: Mapping[str, str], may: Mapping[str, str]) -> Path:
    group.mkdir()
    try:
        for name, value in must.items():
            (group / name).write_text(value)
    except OSError:
        group.rmdir()
        raise
    for name, value in may.items():
        with contextlib.suppress(OSError):
            (group / name).write_text(value)
    return group


def counted(group: Path, file: str, event: str) -> int:
    """How often ``event`` happened, by a file of lines such as ``oom_kill 1``; 0 where nobody says."""
    with contextlib.suppress(OSError, ValueError):
        for line in (group / file).read_text().splitlines():
            what, _, count = line.partition(" ")
            if what == event:
                return int(count)
    return 0


async def remove_group(group: Path) -> None:
    """Delete it, and kill whoever is in it still, wherever it has hidden from its keeper. The kernel needs a
    moment after the last process has gone.
    """
    for _ in range(100):
        if _removed(group):
            return
        await trio.sleep(0.02)
    logger.warning("Cannot remove cgroup %s: it still has processes.", group)


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
        return True
    except FileNotFoundError:
        return True
    except OSError:
        pass
    try:
        (group / "cgroup.kill").write_text("1")
    except OSError:
        # v1 has no such file, nor has an old v2
        with contextlib.suppress(OSError):
            for pid in (group / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
    return False
