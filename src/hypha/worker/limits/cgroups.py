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


#: Where this process may make cgroups: for each controller, of which version its hierarchy is, and in what
#: directory.
CgroupPlaces = Mapping[Controller, tuple[Literal["v2", "v1"], Path]]


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
        return {}
    usable: dict[Controller, tuple[Literal["v2", "v1"], Path]] = {}
    has = frozenset[str]() if v2 is None else usable_v2(v2)
    for controller in CONTROLLERS:
        if v2 is not None and controller in has:
            usable[controller] = ("v2", v2)
        elif controller in v1:
            # The owner of a file may write to it whatever its mode says, so only trying tells.
            probe = v1[controller] / f"hypha-probe-{os.getpid()}"
            with contextlib.suppress(OSError):
                probe.mkdir()
                probe.rmdir()
                usable[controller] = ("v1", v1[controller])
    return usable


def remove_stale_groups(places: CgroupPlaces) -> int:
    """Remove empty groups that workers which were killed have left behind; how many."""
    removed = 0
    for place in {place for _, place in places.values()}:
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
    wanted: dict[Path, Settings] = {}
    for controller, (version, place) in places.items():
        must, may = _settings(controller, version, resources, processes)
        if must:
            before = wanted.get(place / name, ({}, {}))
            wanted[place / name] = (before[0] | must, before[1] | may)
    made: list[Path] = []
    try:
        for group, settings in wanted.items():
            made.append(_write_group(group, *settings))
    except OSError:
        for group in made:
            group.rmdir()
        raise
    return tuple(made)


#: what must be written, and what not every kernel has
Settings = tuple[dict[str, str], dict[str, str]]


def _settings(controller: Controller, version: str, resources: Resources, processes: int) -> Settings:
    memory = str(int(resources.memory * GB))
    quota = str(max(_LEAST_QUOTA_US, int(resources.cpu * CPU_PERIOD_US)))
    match controller, version:
        case "memory", "v2" if resources.memory:
            # An executor that swaps slows down everybody; kernels without swap accounting lack the file.
            return {"memory.max": memory, "memory.oom.group": "1"}, {"memory.swap.max": "0"}
        case "memory", "v1" if resources.memory:
            return {"memory.limit_in_bytes": memory}, {"memory.memsw.limit_in_bytes": memory}
        case "cpu", "v2" if resources.cpu:
            # where more is leased than there is (several workers on a machine), each gets its share
            weight = min(10_000, max(1, round(resources.cpu * _WEIGHT_V2)))
            return {"cpu.max": f"{quota} {CPU_PERIOD_US}"}, {"cpu.weight": str(weight)}
        case "cpu", "v1" if resources.cpu:
            return (
                {"cpu.cfs_period_us": str(CPU_PERIOD_US), "cpu.cfs_quota_us": quota},
                {"cpu.shares": str(max(2, round(resources.cpu * _SHARES_V1)))},
            )
        case "pids", _ if processes:
            return {"pids.max": str(processes)}, {}
        case _:
            return {}, {}


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
