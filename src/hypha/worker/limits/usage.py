"""What an executor uses of what no kernel holds it to: files in its job directory, and cores and processes
where there is no cgroup for them. It is pinned to some cores (:class:`CorePins`). The worker looks at the
rest once a second; whoever has more than it may is to be killed.

A look takes as long as there are files to look at, in a thread. Slices in the worker's cache, which a job
directory holds links to, count nowhere: the cache bounds them. Nor do files that an executor has deleted and
still holds open.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import stat
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hypha.processes.keeper import descendants

logger = logging.getLogger(__name__)

GB = 10**9
#: of the disk, as the kernel counts it
_BLOCK_BYTES = 512
#: so many executors share a core at most before nobody counts any more
_MOST_USERS = 64


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


class CorePins:
    """Hands out ``cores``, those with the fewest users first. ``directory`` is made, and must belong to this
    user alone.

    The workers of one user and machine know nothing of each other, so each core's users are counted by locks
    on files in it that all of them see: the first user of a core holds its file 0, the second its file 1. A
    lock ends with the process that holds it, whatever became of that.
    """

    def __init__(self, cores: Sequence[int], directory: Path | None = None) -> None:
        self._cores = tuple(cores)
        self._directory = directory or Path(tempfile.gettempdir()) / f"hypha-cores-{os.getuid()}"

    def pin(self, cpu: float) -> dict[int, int]:
        """As many cores as ``cpu`` needs, with their locks, to be closed at the end; none where that would be
        all.
        """
        count = max(1, math.ceil(cpu - 1e-9))
        locks: dict[int, int] = {}
        if count >= len(self._cores) or not self._prepared():
            return locks
        for slot in range(_MOST_USERS):
            for core in self._cores:
                if len(locks) == count:
                    return locks
                if core not in locks and (lock := self._lock(core, slot)) is not None:
                    locks[core] = lock
        return locks

    def _prepared(self) -> bool:
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            about = self._directory.lstat()
        except OSError as exc:
            logger.debug("Executors are pinned to no cores: %s", exc)
            return False
        return (
            stat.S_ISDIR(about.st_mode)
            and about.st_uid == os.getuid()
            and not stat.S_IMODE(about.st_mode) & 0o022
        )

    def _lock(self, core: int, slot: int) -> int | None:
        with contextlib.suppress(OSError):
            lock = os.open(
                self._directory / f"{core}.{slot}",
                os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW,
                0o600,
            )
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
            else:
                return lock
        return None
