"""Disks that are small and become full: tmpfs of a few megabytes. Needs root."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


class Disk:
    """A tmpfs at ``path``, filled and emptied at will."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self) -> None:
        """Not a byte is free any more."""
        with self._filler.open("ab", buffering=0) as file:
            for piece in (bytes(1 << 20), bytes(1 << 12)):
                try:
                    while file.write(piece) == len(piece):
                        pass
                except OSError as exc:
                    if exc.errno != errno.ENOSPC:
                        raise

    def make_space(self) -> None:
        """As it was."""
        self._filler.unlink(missing_ok=True)


@contextmanager
def small_disks(root: Path, *names: str, megabytes: int = 96) -> Iterator[tuple[Disk, ...]]:
    """Disks at ``root / name``; gone when the block ends, whoever still has files open there."""
    with ExitStack() as stack:
        disks = []
        for name in names:
            path = root / name
            path.mkdir()
            options = f"size={megabytes}m,mode=0700"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(path)], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", str(path)], check=True)
            disks.append(Disk(path))
        yield tuple(disks)
