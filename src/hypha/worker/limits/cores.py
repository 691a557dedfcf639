"""Which cores an executor runs on, where no cgroup can hold it to its share of all.

The workers of one user and machine know nothing of each other, so each core's users are counted by locks on
files that all of them see: the first user of a core holds its file 0, the second its file 1. A lock ends with
the process that holds it, whatever became of that.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

#: so many executors share a core at most before nobody counts any more
_MOST_USERS = 64


class CorePins:
    """Hands out ``cores``, those with the fewest users first. ``directory`` holds the locks; it is made, and
    must belong to this user alone.
    """

    def __init__(self, cores: Sequence[int], directory: Path | None = None) -> None:
        self._cores = tuple(cores)
        self._directory = directory or Path(tempfile.gettempdir()) / f"hypha-cores-{os.getuid()}"
        #: cores that were handed out -> their locks
        self._held: dict[tuple[int, ...], list[list[int]]] = {}

    def pin(self, cpu: float) -> tuple[int, ...]:
        """As many cores as ``cpu`` needs, for :meth:`release` at the end; none where that would be all."""
        count = max(1, math.ceil(cpu - 1e-9))
        if count >= len(self._cores) or not self._prepared():
            return ()
        locks: dict[int, int] = {}
        for slot in range(_MOST_USERS):
            for core in self._cores:
                if len(locks) == count:
                    break
                if core not in locks and (lock := self._lock(core, slot)) is not None:
                    locks[core] = lock
        chosen = tuple(sorted(locks))
        if chosen:
            self._held.setdefault(chosen, []).append(list(locks.values()))
        return chosen

    def release(self, cores: tuple[int, ...]) -> None:
        if cores in self._held:
            for lock in self._held[cores].pop():
                os.close(lock)
            if not self._held[cores]:
                del self._held[cores]

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
