"""Locks on the directories of datasets, by which processes on one machine know of each other.

A data node shares the lock of what it serves; whoever replaces or removes a directory must have it alone.
A lock is on the directory itself, not on its name, and ends with the process that holds it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def take(directory: Path, how: int) -> int | None:
    """Lock what ``directory`` names now, as ``fcntl.flock`` does: LOCK_SH or LOCK_EX. Does not wait.

    Returns a handle that holds the lock until it is closed, which is the caller's duty; None when another
    process has it. Raises FileNotFoundError, or another OSError where directories cannot be locked (as on
    some network file systems).
    """
    while True:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
            # another directory may have been given the name since the first line
            if os.path.samestat(os.fstat(handle), os.stat(directory)):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
