"""The directory of one job: private, with a short enough path for its socket, gone when the job is.

Paths that executors name are resolved against it and cannot leave it, whatever ``..`` or symbolic link
they hold. A worker that starts removes the directories of one that died; the files of a failed executor
may be kept for a look, the newest few of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath

from hypha.errors import HyphaError, Refused
from hypha.runtime import new_id

logger = logging.getLogger(__name__)

#: ``sun_path`` holds 108 bytes on Linux, 104 on macOS and the BSDs, a final zero included.
MAX_SOCKET_PATH_BYTES = 103
#: Directories of failed executors that are kept, newest first.
KEPT_FAILURES = 5

PARTS = ("artifacts", "slices", "incoming", "outgoing")
_PREFIX, _FAILED_PREFIX = "hypha-", "failed-hypha-"
#: held while the worker lives; and, for a socket with a shorter path, the directory that it is in
_LOCK, _ELSEWHERE = ".lock", ".socket-directory"


class JobDirectory:
    """``work_dir/hypha-<uuid>`` and what is in it.

    It is locked while its worker lives, which is how another worker process on the same ``work_dir``
    tells a stale directory from one in use.
    """

    def __init__(self, path: Path, socket_path: Path, lock: int) -> None:
        self.path = path
        self.socket_path = socket_path
        self._lock = lock

    @classmethod
    def create(cls, work_dir: Path) -> JobDirectory:
        """A fresh one with its sub-directories, all 0700. ``Refused`` when the disk does not take it."""
        path = work_dir.resolve() / f"{_PREFIX}{new_id()}"
        socket_path = path / "bridge.sock"
        if len(os.fsencode(socket_path)) > MAX_SOCKET_PATH_BYTES:
            socket_path = _short_directory() / "bridge.sock"
        # Locked before it has a name that remove_stale of another worker looks for.
        unnamed = path.with_name(f".new-{path.name}")
        lock = -1
        try:
            unnamed.mkdir(mode=0o700, parents=True)
            for name in PARTS:
                (unnamed / name).mkdir(mode=0o700)
            lock = os.open(unnamed / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if socket_path.parent != path:
                (unnamed / _ELSEWHERE).write_text(str(socket_path.parent))
            unnamed.rename(path)
        except OSError as exc:
            if lock >= 0:
                os.close(lock)
            shutil.rmtree(unnamed, ignore_errors=True)
            if socket_path.parent != path:
                shutil.rmtree(socket_path.parent, ignore_errors=True)
            raise Refused("no-space", f"the job directory {path} cannot be made: {exc}") from exc
        return cls(path, socket_path, lock)

    def part(self, name: str) -> Path:
        """One of :data:`PARTS`."""
        return self.path / name

    def relative(self, path: Path) -> str:
        """``path`` as executors see it."""
        return path.relative_to(self.path).as_posix()

    def inside(self, name: str, directory: bool = False) -> Path:
        """The existing file (with ``directory`` also: directory) that an executor calls ``name``;
        ``Refused`` when it lies elsewhere.
        """
        pure = PurePosixPath(name)
        if not name or "\0" in name or pure.is_absolute() or ".." in pure.parts:
            raise Refused("invalid", f"path {name!r} must be relative to the job directory, without '..'")
        try:
            resolved = (self.path / pure).resolve(strict=True)
        except (OSError, RuntimeError) as exc:
            raise Refused("not-found", f"no file {name!r} in the job directory") from exc
        if not resolved.is_relative_to(self.path):
            raise Refused("invalid", f"path {name!r} leaves the job directory")
        if not resolved.is_file() and not (directory and resolved.is_dir()):
            raise Refused("invalid", f"path {name!r} is no regular file")
        return resolved

    def remove(self) -> None:
        """Delete everything; what cannot be deleted is logged."""
        self._remove_short_socket()
        shutil.rmtree(self.path, onerror=_log_failure)
        self._unlock()

    def keep(self, output: str) -> Path:
        """Put it aside with the executor's last output; where it is now."""
        self._remove_short_socket()
        self.socket_path.unlink(missing_ok=True)
        try:
            (self.path / "output.txt").write_text(output)
        except OSError as exc:  # it may have failed because the disk is full
            logger.warning("The output of a failed executor is not kept: %s", exc)
        # Slices are in the cache, or were; they are the bulk of a job directory.
        shutil.rmtree(self.path / "slices", onerror=_log_failure)
        kept = self.path.rename(self.path.with_name(f"failed-{self.path.name}"))
        self._unlock()
        older = sorted(kept.parent.glob(f"{_FAILED_PREFIX}*"), key=lambda path: path.stat().st_mtime)
        for path in older[:-KEPT_FAILURES]:
            shutil.rmtree(path, onerror=_log_failure)
        return kept

    def _remove_short_socket(self) -> None:
        if self.socket_path.parent != self.path:
            shutil.rmtree(self.socket_path.parent, onerror=_log_failure)

    def _unlock(self) -> None:
        os.close(self._lock)


def _short_places() -> list[Path]:
    """Where sockets may lie, whatever TMPDIR says: that may be a long path itself."""
    return [Path(f"/run/user/{os.getuid()}"), Path("/tmp"), Path("/var/tmp"), Path(tempfile.gettempdir())]


def _short_directory() -> Path:
    """A new directory, 0700, for a socket. Raises :class:`HyphaError` when no path is short enough."""
    for place in _short_places():
        try:
            made = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        except OSError:
            continue
        if len(os.fsencode(made / "bridge.sock")) <= MAX_SOCKET_PATH_BYTES:
            return made
        made.rmdir()
    places = ", ".join(map(str, _short_places()))
    raise HyphaError(
        f"work_dir is too long a path for a socket, and none can be made in {places}; shorten it"
    )


def _log_failure(function: object, path: str, failure: object) -> None:
    if not (isinstance(failure, tuple) and isinstance(failure[1], FileNotFoundError)):
        logger.warning("Cannot remove %s.", path, extra={"path": path})


def _remove_stale_socket(path: Path) -> None:
    with contextlib.suppress(OSError):
        elsewhere = Path((path / _ELSEWHERE).read_text())
        if elsewhere.name.startswith(_PREFIX) and elsewhere.parent in _short_places():
            shutil.rmtree(elsewhere, onerror=_log_failure)


def remove_stale(work_dir: Path) -> list[Path]:
    """Remove job directories whose worker is gone; returns them."""
    removed = []
    for path in work_dir.glob(f"{_PREFIX}*") if work_dir.is_dir() else ():
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # no job directory of ours
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_stale_socket(path)
            shutil.rmtree(path, onerror=_log_failure)
            removed.append(path)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)
    return removed
