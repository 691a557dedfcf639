"""The directory of one job: private, with a short enough path for its socket, gone when the job is.

An executor writes to it as it likes. What the worker relies on is beside it, in a directory that an isolated
executor does not see: its lock, files on their way in and out. What the executor names is opened without
following a link (:mod:`hypha.files.beneath`) and used under a name of the worker's own; what comes in is
moved to the executor once it is whole. A worker that starts removes the directories of one that died; the
files of a failed executor may be kept for a look, the newest few of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path, PurePosixPath

import trio

from hypha.errors import HyphaError, Refused
from hypha.files import beneath, disks
from hypha.files.staging import StagedDirectory, remove_unfinished
from hypha.runtime import in_thread, new_id

logger = logging.getLogger(__name__)

#: ``sun_path`` holds 108 bytes on Linux, 104 on macOS and the BSDs, a final zero included.
MAX_SOCKET_PATH_BYTES = 103
#: Threads that work on job directories: those of one job may take all of them, and no others of the worker.
FILES = trio.CapacityLimiter(4)
#: Directories of failed executors that are kept, newest first.
KEPT_FAILURES = 5

PARTS = ("artifacts", "slices", "incoming", "outgoing")
#: Of them, those that an executor only reads.
READ_PARTS = ("artifacts", "slices")
_PREFIX, _FAILED_PREFIX, _OWN_PREFIX = "hypha-", "failed-hypha-", ".hypha-"
#: held while the worker runs
_LOCK = ".lock"
#: of the worker's own directory: what is received, what is fetched, what is sent
_RECEIVING, _FETCHING, _SENDING = "receiving", "fetching", "sending"
#: beside a file that is being received: files that may be written over
_SPARE, _MOST_REUSED = ".spare", 4


class JobDirectory:
    """``work_dir/hypha-<uuid>`` and what is in it; the worker's own files are in ``work_dir/.hypha-<uuid>``.

    That one is locked while its worker runs, which is how another worker process on the same ``work_dir``
    tells a stale directory from one in use.
    """

    def __init__(self, path: Path, socket_path: Path, lock: int) -> None:
        self.path = path
        self.socket_path = socket_path
        self._own = _own_of(path)
        self._lock = lock
        self._sendings, self._fetchings = itertools.count(1), itertools.count(1)

    @classmethod
    def create(cls, work_dir: Path) -> JobDirectory:
        """A fresh one with its sub-directories, all 0700. ``Refused`` when the disk does not take it."""
        path = work_dir.resolve() / f"{_PREFIX}{new_id()}"
        socket_path = path / "bridge.sock"
        if len(os.fsencode(socket_path)) > MAX_SOCKET_PATH_BYTES:
            socket_path = _short_directory(path.name) / "bridge.sock"
        # Locked before it has a name that remove_stale of another worker looks for.
        own, lock = _own_of(path), -1
        try:
            with StagedDirectory(own, mode=0o700) as staged:
                for name in (_RECEIVING, _FETCHING, _SENDING):
                    (staged.path / name).mkdir(mode=0o700)
                lock = os.open(staged.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
                fcntl.flock(lock, fcntl.LOCK_EX)
                staged.publish(replace=False)
            path.mkdir(mode=0o700)
            for name in PARTS:
                (path / name).mkdir(mode=0o700)
        except OSError as exc:
            if lock >= 0:
                os.close(lock)
            for made in (path, own):
                shutil.rmtree(made, ignore_errors=True)
            if socket_path.parent != path:
                shutil.rmtree(socket_path.parent, ignore_errors=True)
            raise Refused("no-space", f"the job directory {path} cannot be made: {exc}") from exc
        return cls(path, socket_path, lock)

    @property
    def occupied(self) -> tuple[Path, ...]:
        """Where the job's files are: the executor's, and those that the worker has for it."""
        return (self.path, self._own)

    @property
    def bounded(self) -> tuple[Path, ...]:
        """Directories for a quota of the file system: all but that of the slices, which are links to files of
        the cache, and no file may have names in two quotas.
        """
        own = (self._own / name for name in (_RECEIVING, _FETCHING, _SENDING))
        parts = (self.part(name) for name in PARTS if name != "slices")
        return (self.path, *parts, self._own, *own)

    def part(self, name: str) -> Path:
        """One of :data:`PARTS`."""
        return self.path / name

    @asynccontextmanager
    async def pinned(self, name: str, directory: bool = False) -> AsyncIterator[Path]:
        """The file (with ``directory`` also: directory) that the executor calls ``name``, under a name of the
        worker's own, where nobody puts another one in its place. ``Refused`` when it is none, or is reached
        through a link. Gone when the block ends.
        """
        try:
            pure = beneath.relative_path(name)
        except ValueError as exc:
            text = f"path {name!r} must be relative to the job directory, without '..'"
            raise Refused("invalid", text) from exc
        place = self._own / _SENDING / str(next(self._sendings))
        target = place / pure.name
        try:
            # in a thread: there may be many files
            await in_thread(self._pin, pure, target, directory, limiter=FILES)
            yield target
        finally:
            with trio.CancelScope(shield=True):
                await in_thread(_remove, place, limiter=FILES)

    def _pin(self, pure: PurePosixPath, target: Path, directory: bool) -> None:
        target.parent.mkdir(mode=0o700)
        try:
            with beneath.directory_below(self.path, pure.parent.parts) as parent:
                mode = os.stat(pure.name, dir_fd=parent, follow_symlinks=False).st_mode
                if directory and stat.S_ISDIR(mode):
                    beneath.link_tree(parent, pure.name, target)
                else:
                    beneath.link_file(parent, pure.name, target)
        except FileNotFoundError as exc:
            raise Refused("not-found", f"no file {str(pure)!r} in the job directory") from exc
        except OSError as exc:
            raise Refused(
                "invalid",
                f"path {str(pure)!r} is no regular file of the job directory, reached without links: "
                f"{exc.strerror or exc}",
            ) from exc

    def receiving(self, name: str) -> Path:
        """Where the file that becomes ``incoming/<name>`` is received. A file of ``incoming/.spare``, which
        the executor is done with, is put where it will be written over.
        """
        own = self._own / _RECEIVING
        with contextlib.suppress(OSError):
            self._take_spare(own / _SPARE)
        return own / name

    def _take_spare(self, own: Path) -> None:
        own.mkdir(mode=0o700, exist_ok=True)
        with beneath.directory_below(self.path, ("incoming", _SPARE)) as reused:
            with os.scandir(reused) as entries:
                name = next((one.name for one in entries if one.is_file(follow_symlinks=False)), None)
            if name is None or len(os.listdir(own)) >= _MOST_REUSED:
                return
            os.rename(name, own / name, src_dir_fd=reused)
            # looked at once it is moved: it may be another one than a moment ago, and stays where it is then
            found = (own / name).lstat()
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
                return
            if not stat.S_ISDIR(found.st_mode):
                (own / name).unlink()

    def deliver(self, path: Path) -> str:
        """Move what was received at ``path`` to the executor; how that calls it. ``Refused`` when the
        executor has put something else where it should go.
        """
        self._hand_over(path, "incoming", path.name)
        return f"incoming/{path.name}"

    @contextmanager
    def fetching(self) -> Iterator[Path]:
        """An empty directory that becomes one of its name in ``artifacts`` when the block ends, and nothing
        when it ends with an exception. ``Refused`` when the executor has put something else there.
        """
        place = self._own / _FETCHING / str(next(self._fetchings))
        place.mkdir(mode=0o700)
        try:
            yield place
            self._hand_over(place, "artifacts", place.name)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _hand_over(self, path: Path, part: str, name: str) -> None:
        try:
            with beneath.directory_below(self.path, (part,)) as directory:
                os.rename(path, name, dst_dir_fd=directory)
        except OSError as exc:
            raise Refused(
                "invalid", f"{part}/{name} of the job directory is not as the worker made it: {exc.strerror}"
            ) from exc

    def remove(self) -> None:
        """Delete everything; what cannot be deleted is logged."""
        self._remove_short_socket()
        _remove(self.path)
        self._unlock()

    def keep(self, output: str) -> Path:
        """Put it aside with the executor's last output; where it is now."""
        self._remove_short_socket()
        self.socket_path.unlink(missing_ok=True)
        try:
            with beneath.directory_below(self.path) as directory:
                beneath.write_file(directory, "output.txt", output.encode())
        except OSError as exc:  # it may have failed because the disk is full
            logger.warning("The output of a failed executor is not kept: %s", exc)
        # Slices are in the cache, or were; they are the bulk of a job directory.
        _remove(self.path / "slices")
        kept = self.path.rename(self.path.with_name(f"failed-{self.path.name}"))
        self._unlock()
        older = sorted(kept.parent.glob(f"{_FAILED_PREFIX}*"), key=lambda path: path.stat().st_mtime)
        for path in older[:-KEPT_FAILURES]:
            _remove(path)
        return kept

    def _remove_short_socket(self) -> None:
        if self.socket_path.parent != self.path:
            _remove(self.socket_path.parent)

    def _unlock(self) -> None:
        _remove(self._own)
        os.close(self._lock)


def _own_of(path: Path) -> Path:
    return path.with_name(f"{_OWN_PREFIX}{path.name.removeprefix(_PREFIX)}")


def _short_places() -> list[Path]:
    """Where sockets may lie, whatever TMPDIR is: that may be a long path itself."""
    return [Path(f"/run/user/{os.getuid()}"), Path("/tmp"), Path("/var/tmp"), Path(tempfile.gettempdir())]


def _short_directory(name: str) -> Path:
    """A new directory, 0700, for the socket of the job directory ``name``. Raises :class:`HyphaError` when no
    path is short enough.
    """
    for place in _short_places():
        made = place / name
        if len(os.fsencode(made / "bridge.sock")) <= MAX_SOCKET_PATH_BYTES:
            with contextlib.suppress(OSError):
                made.mkdir(mode=0o700)
                return made
    places = ", ".join(map(str, _short_places()))
    raise HyphaError(
        f"work_dir is too long a path for a socket, and none can be made in {places}; shorten it"
    )


def _remove(path: Path) -> None:
    try:
        beneath.remove_tree(path)
    except FileNotFoundError:
        pass
    except OSError as exc:
        logger.warning("Cannot remove %s: %s", path, exc.strerror or exc, extra={"path": path})


def remove_stale(work_dir: Path) -> list[Path]:
    """Remove job directories whose worker is gone; returns them."""
    removed = []
    if not work_dir.is_dir():
        return []
    remove_unfinished(work_dir, lambda name: name.startswith(_OWN_PREFIX))
    for own in work_dir.glob(f"{_OWN_PREFIX}*"):
        try:
            lock = disks.lock(own / _LOCK, fcntl.LOCK_EX)
        except OSError:
            continue  # no job directory of ours
        if lock is not None:
            path = own.with_name(own.name.removeprefix("."))
            for one in (path, *(place / path.name for place in _short_places()), own):
                _remove(one)
            os.close(lock)
            removed.append(path)
    return removed
