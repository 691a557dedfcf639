"""Files below a directory that somebody else writes to, opened, linked and moved without following a link.

Whoever may write to a directory may replace any name in it by a symbolic link, at any moment: a path that
was looked at is another one when it is opened. Here each component is opened by itself, relative to the one
before, and none of them through a link, so that what is used lies below the directory that one began with.
Nor is anything here as deep, in calls or open files, as somebody else's directories are. All of it blocks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: A FIFO that nobody writes to must not hold up whoever opens it.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
#: Of a directory that is linked as a whole: files and directories in it, and how deep they may lie.
MAX_LINKED, MAX_DEPTH = 10_000, 32
#: What link(2) says where a file system has no hard links, or no more for this file.
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP)


def relative_path(name: str) -> PurePosixPath:
    """``name``, which somebody else made up, as a path that stays below a directory; ValueError if it does
    not, or is none of a file.
    """
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name!r} is no relative path without '..'")
    return path


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
    ``directory``. What is neither a file nor a directory is left out. Raises OSError, also when there are
    more than :data:`MAX_LINKED` entries, or they lie deeper than :data:`MAX_DEPTH`.
    """
    _link_tree(directory, name, target, MAX_DEPTH, MAX_LINKED)


def _link_tree(directory: int, name: str, target: Path, depth: int, left: int) -> int:
    """How many entries more there may be."""
    target.mkdir(mode=0o700)
    below = os.open(name, _DIRECTORY, dir_fd=directory)
    try:
        with os.scandir(below) as entries:
            for entry in entries:
                left -= 1
                if left < 0 or not depth:
                    text = f"it has more than {MAX_LINKED} files, or directories deeper than {MAX_DEPTH}"
                    raise OSError(errno.EFBIG, text)
                if entry.is_dir(follow_symlinks=False):
                    left = _link_tree(below, entry.name, target / entry.name, depth - 1, left)
                elif entry.is_file(follow_symlinks=False):
                    link_file(below, entry.name, target / entry.name)
    finally:
        os.close(below)
    return left


def remove_tree(path: Path) -> None:
    """Delete the directory ``path`` and all that is in it, however deep it is, and whatever permissions its
    owner has taken away. Raises OSError; NotADirectoryError for a link.
    """
    here = _opened(path)
    try:
        names = os.listdir(here)
        #: the directories above this one: which they are, how this one is called there, what is left there
        above: list[tuple[tuple[int, int], str, list[str]]] = []
        while names or above:
            if names:
                name = names.pop()
                try:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=here)
                except IsADirectoryError:
                    below = _opened(name, here)
                    above.append((_identity(here), name, names))
                    os.close(here)
                    here = below
                    names = os.listdir(here)
                continue
            identity, name, names = above.pop()
            parent = os.open("..", _DIRECTORY, dir_fd=here)
            os.close(here)
            here = parent
            if _identity(here) != identity:
                raise OSError(errno.ESTALE, f"{name} was moved while it was deleted")
            os.rmdir(name, dir_fd=here)
    finally:
        os.close(here)
    os.rmdir(path)


def _identity(directory: int) -> tuple[int, int]:
    found = os.fstat(directory)
    return found.st_dev, found.st_ino


def _opened(name: str | Path, directory: int | None = None) -> int:
    """A descriptor of a directory, which its owner may do everything with from now on."""
    try:
        descriptor = os.open(name, _DIRECTORY, dir_fd=directory)
    except PermissionError:
        # not by its name, which may be a link by then
        place = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            os.chmod(f"/proc/self/fd/{place}", 0o700)
        finally:
            os.close(place)
        descriptor = os.open(name, _DIRECTORY, dir_fd=directory)
    if os.fstat(descriptor).st_mode & 0o700 != 0o700:
        os.fchmod(descriptor, 0o700)
    return descriptor


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
