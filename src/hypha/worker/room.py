"""Is there room on the disk? Asked before a worker takes on what it could not write."""

from __future__ import annotations

import os
from pathlib import Path

#: Left to others. More than transfers leave, so that a full disk is noticed here first, by name.
RESERVE_BYTES = 32 << 20


def lack_of_room(directory: Path, size: int = 0) -> str | None:
    """Why ``size`` more bytes do not fit into the existing ``directory``; None when they do."""
    try:
        found = os.statvfs(directory)
    except OSError as exc:
        return f"{directory} cannot be used: {exc.strerror or exc}"
    free = found.f_bavail * found.f_frsize
    if free >= size + RESERVE_BYTES:
        return None
    needed = f"{size / 1e6:.1f} MB are needed and " if size else ""
    return f"the disk of {directory} is full: {needed}{free / 1e6:.1f} MB are free; make room there"
