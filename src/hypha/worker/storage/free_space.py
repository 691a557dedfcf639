"""Is there room on the disk? Asked before a worker takes on what it could not write."""

from __future__ import annotations

from pathlib import Path

from hypha.runtime import free_bytes

#: Left to others. More than transfers leave, so that a full disk is noticed here first, by name.
RESERVE_BYTES = 32 << 20


def lack_of_space(directory: Path, size: int = 0) -> str | None:
    """Why ``size`` more bytes do not fit into the existing ``directory``; None when they do."""
    try:
        free = free_bytes(directory)
    except OSError as exc:
        return f"{directory} cannot be used: {exc.strerror or exc}"
    if free >= size + RESERVE_BYTES:
        return None
    needed = f"{size / 1e6:.1f} MB are needed and " if size else ""
    return f"the disk of {directory} is full: {needed}{free / 1e6:.1f} MB are free; make room there"
