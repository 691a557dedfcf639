"""Measures how long something takes on a machine that is busy with other things."""

from __future__ import annotations

import time
from pathlib import Path


class Stopwatch:
    """Seconds since it was made, without those in which the watched thread waited for a processor (in the
    kernel's run queue). It watches the thread that makes it, or the main thread of the process ``pid``, which
    may have ended meanwhile, as long as nobody has collected its exit code. Where the kernel does not tell,
    these seconds count.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._task = "thread-self" if pid is None else str(pid)
        self._waited_s = self._waited()
        self._began = time.monotonic()

    def elapsed_s(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._began - (self._waited() - self._waited_s)

    def _waited(self) -> float:
        try:
            _, waited_ns, _ = Path(f"/proc/{self._task}/schedstat").read_text().split()
        except OSError:
            return 0.0
        return int(waited_ns) / 1e9
