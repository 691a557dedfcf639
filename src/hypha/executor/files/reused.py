"""Files that are done with and will be written over, rather than deleted and made anew.

A synchronisation writes each file that it deletes: a hundred megabytes of new pages cost three times as much
as writing over old ones, and deleting them costs again (``bench/outer_sync.py`` measures it).
``incoming/.spare`` is shared with the worker, which writes what arrives over what lies there.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class ReusedFiles:
    """At most ``limit`` files in ``directory``; what is given beyond that is deleted."""

    def __init__(self, directory: Path, limit: int = 2) -> None:
        self._directory = directory
        self._limit = limit
        self._given = 0

    def give(self, path: Path) -> None:
        """Nobody uses ``path`` any more; a file with other names is only unlinked."""
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            if path.stat().st_nlink == 1 and len(os.listdir(self._directory)) < self._limit:
                self._given += 1
                path.rename(self._directory / f"{self._given}-{path.name}")
                return
        except OSError:
            # then it is deleted as ever
            pass
        path.unlink(missing_ok=True)

    def take(self, path: Path) -> None:
        """Move one to ``path``, with whatever is in it, if there is any."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._directory):
                with contextlib.suppress(FileNotFoundError):
                    # the worker may be faster
                    (self._directory / name).rename(path)
                    return
