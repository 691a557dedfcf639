"""What an executor uses of what no kernel holds it to: files in its job directory, and processes where there
is no cgroup for them. The worker looks once a second; whoever has more than it may is to be killed.

A look takes as long as there are files to look at, in a thread. Slices in the worker's cache, which a job
directory holds links to, count nowhere: the cache bounds them. Nor do files that an executor has deleted and
still holds open.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import trio

from hypha.processes.keeper import descendants
from hypha.runtime import in_thread

GB = 10**9
#: between two looks
LOOK_S = 1.0
#: of the disk, as the kernel counts it
_BLOCK_BYTES = 512


@dataclass(frozen=True)
class Quota:
    """What one executor may have, and is watched for; 0: any amount."""

    disk_bytes: int = 0
    processes: int = 0

    def __bool__(self) -> bool:
        return bool(self.disk_bytes or self.processes)


@dataclass(frozen=True)
class Excess:
    """Why an executor was ended: ``kind`` is that of an :class:`~hypha.messages.ExecutorError`, ``resource``
    what it had too much of.
    """

    kind: str
    message: str
    resource: Literal["memory", "disk", "processes"]


def excess(quota: Quota, disk_bytes: int, processes: int) -> Excess | None:
    """What is more than ``quota``, in words that say what to do."""
    if quota.disk_bytes and disk_bytes > quota.disk_bytes:
        return Excess(
            "disk",
            f"disk quota exceeded: its files in the job directory take {disk_bytes / GB:.3g} GB, and its "
            f"lease reserves {quota.disk_bytes / GB:.3g} GB; the job's resources.worker.storage, or "
            "resources.parameter_server.storage, may be too low",
            "disk",
        )
    if quota.processes and processes > quota.processes:
        return Excess(
            "internal",
            f"it had {processes} processes and threads, and may have {quota.processes}; if it needs so many, "
            "set limits.max_processes of its worker higher",
            "processes",
        )
    return None


def disk_usage(places: Iterable[Path], shared: Path | None = None) -> int:
    """Bytes that the files in ``places`` take on the disk, each file counted once; of those below ``shared``
    only the ones that have no other name. What vanishes meanwhile, or cannot be read, counts nothing.
    """
    held = 0
    seen: set[tuple[int, int]] = set()
    queue = [(place, False) for place in places]
    while queue:
        directory, is_shared = queue.pop()
        is_shared = is_shared or directory == shared
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(found.st_mode):
                        queue.append((Path(entry.path), is_shared))
                    elif found.st_nlink > 1:
                        if is_shared or (found.st_dev, found.st_ino) in seen:
                            continue
                        seen.add((found.st_dev, found.st_ino))
                    held += found.st_blocks * _BLOCK_BYTES
    return held


def count_tasks(keeper: int) -> int:
    """Processes below ``keeper``, and their threads."""
    found = 0
    for pid in descendants(keeper):
        with contextlib.suppress(OSError):
            found += len(os.listdir(f"/proc/{pid}/task"))
    return found


async def keep_within(
    quota: Quota,
    places: tuple[Path, ...],
    shared: Path,
    keeper: Callable[[], int | None],
    exceeded: Callable[[Excess], None],
) -> None:
    """Look until ``quota`` is exceeded, and report that once. ``keeper`` gives the process to look below,
    once there is one.
    """
    while quota:
        await trio.sleep(LOOK_S)
        disk = await in_thread(disk_usage, places, shared, abandon_on_cancel=True) if quota.disk_bytes else 0
        pid = keeper()
        tasks = 0
        if quota.processes and pid is not None:
            tasks = await in_thread(count_tasks, pid, abandon_on_cancel=True)
        if (found := excess(quota, disk, tasks)) is not None:
            exceeded(found)
            return
