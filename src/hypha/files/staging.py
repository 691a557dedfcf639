"""Files and directories that appear whole or not at all, whoever is killed or runs out of space meanwhile.

Each is filled under a hidden name beside its place, ``.<name>.preparing-*``, and renamed once it is whole. It
is locked until then: what an earlier process left half-way has a lock that nobody holds, and whoever writes
to the same name next removes it. Names are new ones, so two writers of one file never share one, and a link
that somebody put in the way is replaced, never followed. With ``durable`` all of it, and the rename, survive
a power cut. What cannot be written is an OSError that names the file, and on a full disk what to do.

A directory that is replaced changes names with its successor in one step where the system can do that.
Elsewhere it is called ``.<name>.replaced-*`` for a moment, and the next process gives it its name back if
its successor never came. All of it blocks. The directory in which something appears is trusted; where
somebody else writes to it, see :mod:`hypha.files.beneath`. Files and directories are one module, as both are
found, locked and removed by the same names.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import io
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from hypha.files.disks import lock, naming, sync, sync_tree

logger = logging.getLogger(__name__)

#: what can be written; collections.abc has it from Python 3.12 on
Buffer = bytes | bytearray | memoryview

#: of Linux's <fcntl.h> and <linux/fs.h>
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_STEM_BYTES = 200
_CHUNK_BYTES = 1 << 20


@contextlib.contextmanager
def _alone(path: Path, without_locks: bool = False) -> Iterator[bool]:
    """Whether ``path`` is there and no other process is at work on it, nor will be while this lasts;
    ``without_locks`` where nothing can tell.
    """
    try:
        handle = lock(path, fcntl.LOCK_EX)
    except FileNotFoundError:
        yield False
        return
    except OSError:
        yield without_locks
        return
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _left(directory: Path, of: Callable[[str], bool]) -> list[tuple[str, Path]]:
    """What stands in ``directory`` in place of other names, ``preparing`` or ``replaced``; the last to be
    renamed comes first.
    """
    found = []
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            own, _, rest = entry.name.rpartition(".")
            kind = rest.partition("-")[0]
            if (
                own.startswith(".")
                and kind in ("preparing", "replaced")
                and of(own[1:])
                and not entry.is_symlink()
            ):
                with contextlib.suppress(FileNotFoundError):
                    found.append((entry.stat().st_ctime_ns, kind, Path(entry.path)))
    return [(kind, path) for _, kind, path in sorted(found, reverse=True)]


def remove_unfinished(directory: Path, of: Callable[[str], bool] = bool) -> None:
    """Remove what processes that are gone left half-way in ``directory``: what was to have a name ``of``
    which is true, and what had it before its successor came.
    """
    for kind, path in _left(directory, of):
        with _alone(path) as free:
            name = path.name.rpartition(".")[0][1:]
            if free and (kind == "preparing" or path.with_name(name).exists()):
                remove(path)


def restore(target: Path) -> None:
    """Give back its name to a directory that a process which is gone took away, putting nothing there."""
    if os.path.lexists(target):
        return
    for kind, path in _left(target.parent, _stem(target.name).__eq__):
        if kind != "replaced":
            continue
        # where there are no locks: a process that is between its two renames now refuses to go on, then
        with _alone(path, without_locks=True) as free:
            if free:
                path.rename(target)
                sync(target.parent)
                logger.warning("%s is there again: a run that was replacing it was killed half-way.", target)
                return


def remove(path: Path) -> None:
    """Delete a file, or a directory with all that is in it, as far as that can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{_stem(path.name)}.{kind}-{secrets.token_hex(4)}")


def _stem(name: str) -> str:
    """As much of a name as leaves space for what is added to it: 255 bytes are all it may have."""
    return os.fsdecode(os.fsencode(name)[:_STEM_BYTES])


# --- files ---------------------------------------------------------------------------------------------


class _Raw(io.FileIO):
    """A write to a descriptor does not say which file it was: it is to ``path``."""

    path: Path

    def write(self, data: Any, /) -> int:
        with naming(self.path):
            return super().write(data)


class StagedFile(AbstractContextManager["StagedFile"]):
    """``with StagedFile(path) as staged:`` write to ``staged.file``, then ``staged.publish()``. Left without
    that, nothing has changed.

    ``mode``: as the umask has it; with one, nobody else may read it until it is whole. ``exclusive``:
    FileExistsError where there is something at ``path``. ``over`` moves an old file to the path that it is
    given, if it has one, to be written over. Raises OSError; also for a device or a FIFO, which is not
    replaced.
    """

    def __init__(
        self,
        path: Path,
        *,
        durable: bool = False,
        mode: int | None = None,
        exclusive: bool = False,
        over: Callable[[Path], object] | None = None,
    ) -> None:
        self.path = path
        self._durable, self._mode, self._exclusive, self._over = durable, mode, exclusive, over
        with naming(path):
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISREG(found := path.stat().st_mode) and not stat.S_ISDIR(found):
                    raise OSError(errno.EINVAL, "it is no regular file, and is not replaced", str(path))
            if over is None:  # files are reused by an executor alone, whose directory goes with it
                remove_unfinished(path.parent, _stem(path.name).__eq__)
            self.staged, descriptor = self._make()
            raw = _Raw(descriptor, "wb")
            raw.path = path
            self.file: BinaryIO = io.BufferedWriter(raw)

    def _make(self) -> tuple[Path, int]:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        if self._over is None:
            flags |= os.O_EXCL
        while True:
            staged = _hidden(self.path, "preparing")
            if self._over is not None:
                self._over(staged)
            descriptor = os.open(staged, flags, 0o666 if self._mode is None else 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # another process, removing what is left of earlier ones, came between
                os.close(descriptor)
                continue
            except OSError:
                # there are no locks here, so nobody removes anything
                return staged, descriptor
            if os.fstat(descriptor).st_nlink:
                return staged, descriptor
            os.close(descriptor)

    def __exit__(self, *exc: object) -> None:
        """Close and delete it, unless it was published."""
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self.staged.unlink()

    def publish(self) -> None:
        """Put the file in its place. OSError when that cannot be; nothing has changed then."""
        with naming(self.path):
            self.file.flush()
            descriptor = self.file.fileno()
            if self._over is not None:
                os.ftruncate(descriptor, self.file.tell())
            if self._mode is not None:
                os.fchmod(descriptor, self._mode)
            if self._durable:
                os.fsync(descriptor)
            # some file systems say only now that there is no space; the lock is held on
            held = os.dup(descriptor)
            try:
                self.file.close()
                try:
                    # unlike rename, a link fails when somebody made the file in the meantime
                    (os.link if self._exclusive else os.replace)(self.staged, self.path)
                except FileExistsError:
                    raise
                except OSError:  # no hard links on this file system
                    if not self._exclusive or os.path.lexists(self.path):
                        raise
                    os.rename(self.staged, self.path)
            finally:
                os.close(held)
            if self._durable:
                sync(self.path.parent)


def write_whole(
    path: Path, data: Buffer, *, durable: bool = False, mode: int | None = None, exclusive: bool = False
) -> None:
    """``path`` has all of ``data`` or is as before. OSError; the rest as :class:`StagedFile`."""
    with StagedFile(path, durable=durable, mode=mode, exclusive=exclusive) as staged:
        staged.file.write(data)
        staged.publish()


def write_output(path: Path, text: str) -> None:
    """Write what a user wants to have at ``path``: where a link leads, and to a device or a pipe, or to
    /dev/stdout whatever that is, as it is; whole or not at all otherwise. OSError.
    """
    standard = str(path).startswith(("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/"))
    if standard or (path.exists() and not path.is_file()):
        # not made anew: others write to it, too
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    else:
        write_whole(path.resolve(), text.encode())


# --- directories ---------------------------------------------------------------------------------------


class StagedDirectory(AbstractContextManager["StagedDirectory"]):
    """``with StagedDirectory(target) as staged:`` fill ``staged.path``, then ``staged.publish()``. Left
    without that, everything is removed. Raises OSError.

    Made with ``mode`` and the umask: who may read what a user makes is for the user to say.
    """

    def __init__(self, target: Path, *, durable: bool = False, mode: int = 0o777) -> None:
        self.target = target
        self._durable = durable
        with naming(target):
            restore(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_unfinished(target.parent, _stem(target.name).__eq__)
            self.path, self._lock = self._make(mode)

    def _make(self, mode: int) -> tuple[Path, int | None]:
        while True:
            path = _hidden(self.target, "preparing")
            try:
                path.mkdir(mode)
            except FileExistsError:
                continue
            try:
                handle = lock(path, fcntl.LOCK_EX)
            except FileNotFoundError:
                # another process, removing what is left of earlier ones, came between
                continue
            except OSError:
                return path, None
            if handle is not None:
                return path, handle

    def __exit__(self, *exc: object) -> None:
        remove(self.path)
        self._unlock()

    def copy(self, source: Path, name: str, check: Callable[[], None] = lambda: None) -> None:
        """Make the file ``name``, and the directories that it is in, of another. ``check`` is called before
        each megabyte, and may raise.
        """
        path = self.path / name
        with naming(self.target / name):
            path.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as read:
            with naming(self.target / name):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with _Raw(descriptor, "wb") as made:
                made.path = self.target / name
                while data := read.read(_CHUNK_BYTES):
                    check()
                    while data:
                        data = data[made.write(data) :]

    def copy_tree(self, source: Path) -> None:
        """Copy all files in ``source``, and those that links in it lead to."""
        for path in sorted(source.rglob("*")):
            if not path.is_dir():
                self.copy(path, path.relative_to(source).as_posix())

    def publish(self, replace: bool = True, before: Callable[[], None] = lambda: None) -> None:
        """Put the directory in its place, and delete what was there; without ``replace`` OSError where there
        is more than an empty directory. ``before`` is called at the last moment, when all is durable, and may
        raise. OSError when it cannot be.
        """
        with naming(self.target):
            if self._durable:
                sync_tree(self.path)
            before()
            old = None
            if replace:
                old = _change_places(self.path, self.target)
            else:
                self.path.rename(self.target)
            if self._durable:
                sync(self.target.parent)
        # others may lock it from now on, however long the removal takes
        self._unlock()
        if old is not None:
            remove(old)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def move_directory(source: Path, target: Path) -> None:
    """The durable directory ``source`` becomes ``target``, durably; what was there is deleted. OSError."""
    with naming(target):
        restore(target)
        old = _change_places(source, target)
        sync(target.parent)
    if old is not None:
        remove(old)
    remove_unfinished(target.parent, _stem(target.name).__eq__)


def _change_places(source: Path, target: Path) -> Path | None:
    """``source`` becomes ``target``; returns where the directory is now that was there before."""
    try:
        kind = target.lstat().st_mode
    except FileNotFoundError:
        source.rename(target)
        return None
    if not stat.S_ISDIR(kind):
        raise NotADirectoryError(errno.ENOTDIR, "it is no directory, and is not replaced", str(target))
    if exchange(source, target):
        return source
    replaced = _hidden(target, "replaced")
    target.rename(replaced)
    try:
        source.rename(target)
    finally:
        if not target.exists():
            replaced.rename(target)
    return replaced


def exchange(one: Path, other: Path) -> bool:
    """Let two directories change names, in one step that nothing can interrupt. False when that cannot be
    done, for whatever reason; two renames will say why.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    paths = [os.fsencode(path.absolute()) for path in (one, other)]
    status = renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], ctypes.c_uint(_RENAME_EXCHANGE))
    return bool(status == 0)
