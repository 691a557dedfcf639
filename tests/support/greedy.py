"""A training executor that takes more than its lease, in each of its first three lives in another way.

``python -m tests.support.greedy SOCKET``, with a directory for its memory of earlier lives in ``GREEDY``: it
allocates, then fills the disk, then forks a thousand children, and is Hypha's own training executor at last.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

_MB = 10**6
#: what no lease of a test reserves
MOST_BYTES, MOST_CHILDREN = 3000 * _MB, 1000
#: if nobody ends it, a test that waits for that has failed
_PATIENCE_S = 60.0


def allocate() -> None:
    """Memory, until there is none."""
    held = []
    while len(held) * 20 * _MB < MOST_BYTES:
        held.append(bytearray(b"x" * (20 * _MB)))


def fill() -> None:
    """The job directory, then wait for what comes of it."""
    with Path("outgoing/full").open("wb") as file:
        for _ in range(30):
            file.write(b"x" * (10 * _MB))
    time.sleep(_PATIENCE_S)


def fork() -> None:
    """Children that do nothing."""
    for _ in range(MOST_CHILDREN):
        if os.fork() == 0:
            time.sleep(_PATIENCE_S)
            os._exit(0)
    time.sleep(_PATIENCE_S)


LIVES: tuple[Callable[[], None], ...] = (allocate, fill, fork)


def main() -> None:
    """The program."""
    memory = Path(os.environ["GREEDY"])
    memory.mkdir(exist_ok=True)
    lived = len(list(memory.iterdir()))
    (memory / str(lived)).touch()
    if lived < len(LIVES):
        LIVES[lived]()
        raise SystemExit(f"nobody minded that it would {LIVES[lived].__name__}")
    os.execv(sys.executable, [sys.executable, "-m", "hypha.executor.training", *sys.argv[1:]])


if __name__ == "__main__":
    main()
