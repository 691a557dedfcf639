"""Files below a directory that somebody else writes to: opened, linked and moved without following a link.

Whoever may write to a directory may replace any name in it by a symbolic link, at any moment: a path that
was looked at is another one when it is opened. Here each component is opened by itself, relative to the one
before, and none of them through a link, so that what is used lies below the directory that one began with.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: A FIFO that nobody writes to must not hold up whoever opens it.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
#: What link(2) says where a file system has no hard links, or no more for this file.
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP)


@contextmanager
def directory_below(root: Path, names: Sequence[str] = ()) -> Iterator[int]:
    """A descriptor of the directory ``names`` below ``root``, a directory whose own path is trusted. Raises
    OSError when a component is no directory, links included.
    """
    descriptor = os.open(root, _DIRECTORY)
    try:
        for name in names:
            below = os.open(name, _DIRECTORY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


def link_file(directory: int, name: str, target: Path) -> None:
    """Make ``target``, in a directory that nobody else writes to, another name of the regular file ``name``
    in ``directory``; a copy, where there are no hard links. Raises OSError; ``target`` is not there then.
    """
    try:
        os.link(name, target, src_dir_fd=directory, follow_symlinks=False)
    except OSError as exc:
        if exc.errno in _NO_LINKS:
            _copy(directory, name, target)
            return
        raise
    if not stat.S_ISREG(target.lstat().st_mode):
        target.unlink()
        raise OSError(errno.EINVAL, f"{name} is no regular file")


def link_tree(directory: int, name: str, target: Path) -> None:
    """Make ``target`` a directory of links to the regular files below the directory ``name`` in
    ``directory``. What is neither a file nor a directory is left out. Raises OSError.
    """
    target.mkdir(mode=0o700)
    below = os.open(name, _DIRECTORY, dir_fd=directory)
    try:
        for entry in os.listdir(below):
            mode = os.stat(entry, dir_fd=below, follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                link_tree(below, entry, target / entry)
            elif stat.S_ISREG(mode):
                link_file(below, entry, target / entry)
    finally:
        os.close(below)


def move_into(source: Path, directory: int, name: str) -> None:
    """Give ``source`` the name ``name`` in ``directory``, replacing a file or an empty directory of its kind.
    Raises OSError.
    """
    os.rename(source, name, dst_dir_fd=directory)


def write_file(directory: int, name: str, data: bytes) -> None:
    """Write the file ``name`` anew, whatever has that name now. Raises OSError, for a directory as well."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name, flags, 0o600, dir_fd=directory), "wb") as file:
        file.write(data)


def open_file(directory: int, name: str) -> int:
    """A descriptor of the regular file ``name`` in ``directory``, to read from. Raises OSError."""
    descriptor = os.open(name, _FILE, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{name} is no regular file")
    return descriptor


def _copy(directory: int, name: str, target: Path) -> None:
    with open(open_file(directory, name), "rb") as source, target.open("xb") as made:
        shutil.copyfileobj(source, made)
