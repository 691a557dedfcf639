"""What files need of the disk that they are on: space, told by the file where there is none; sync; locks.

All of it blocks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

#: What a write says on a full disk, and what helps.
_FULL = {
    errno.ENOSPC: "make space on that disk",
    errno.EDQUOT: "raise the quota, or delete files that count towards it",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
}


def is_disk_full(exc: BaseException) -> bool:
    """Whether ``exc`` says that there is no space for what was to be written."""
    return isinstance(exc, OSError) and exc.errno in _FULL


def explained(exc: OSError) -> str:
    """What went wrong, without the file's name, and what to do where the disk is full."""
    text = exc.strerror or str(exc)
    advice = _FULL.get(exc.errno or 0)
    return text if advice is None or text.endswith(advice) else f"{text}; {advice}"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block as one about ``path``, and with what to do where the disk is full."""
    try:
        yield
    except OSError as exc:
        if exc.filename == str(path):
            raise
        raise OSError(exc.errno, explained(exc), str(path)) from exc


def existing(path: Path) -> Path:
    """``path``, or the nearest above it that is there: on its disk ``path`` will be."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def free_bytes(directory: Path) -> int:
    """Space left for this user on the disk of an existing ``directory``. Raises OSError. Components ask
    :func:`hypha.runtime.free_bytes`, as their disks may be simulated.
    """
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a directory, durable."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """Make a directory and all that is in it durable; what links lead to is not in it."""
    for place, _, names in os.walk(directory, topdown=False):
        for name in names:
            path = Path(place) / name
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(Path(place))


def lock(path: Path, how: int) -> int | None:
    """Lock the file or directory that ``path`` names now, as ``fcntl.flock`` does: LOCK_SH or LOCK_EX. Does
    not wait.

    Returns a handle that holds the lock until it is closed, which is the caller's duty; None when another
    process has it. Raises FileNotFoundError, or another OSError where nothing can be locked (as on some
    network file systems).
    """
    while True:
        # a FIFO that nobody writes to must not hold up whoever opens it
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
            # something else may have been given the name since the first line
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
