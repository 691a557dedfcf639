"""A directory appears whole or not at all: it is filled beside its place, made durable, then renamed.

Whoever is killed meanwhile leaves a hidden ``.<name>.preparing-*``, which nothing serves and the next
run removes; a lock on it tells that from one in use. A data node holds a lock on what it serves, so that
nothing is replaced under it: its jobs would ask for slices that are gone.

What is replaced changes names with its successor in one step where the system can do that. Elsewhere it is
called ``.<name>.replaced-*`` for a moment; the next run restores it when its successor never came.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from hypha.data.labels import LABELS_FILE
from hypha.data.locks import take
from hypha.data.manifest import HOLDOUT, MANIFEST_FILE
from hypha.data.slices import SUFFIX, sync
from hypha.errors import DataError, InputUnusable

logger = logging.getLogger(__name__)

#: of Linux's <fcntl.h> and <linux/fs.h>
AT_FDCWD = -100
RENAME_EXCHANGE = 2


class Staging:
    """``with Staging(target, force) as staging:`` fill ``staging.directory``, then ``staging.publish()``.

    Left without that, everything is removed. Raises DataError when the target may not be written.
    """

    def __init__(self, target: Path, force: bool) -> None:
        self.target = target.resolve()
        self._force = force
        self._staged = f".{self.target.name}.preparing-"
        self._replaced = f".{self.target.name}.replaced-"
        try:
            self._restore()
            with contextlib.ExitStack() as stack:
                self._check(stack)
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            self.directory, self._lock = self._own_directory()
        except OSError as exc:
            raise DataError(f"{self.target.parent} cannot be written: {exc.strerror}") from exc

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self._unlock()

    def publish(self) -> None:
        """Put the directory in its place. Raises DataError when that cannot be."""
        try:
            sync(self.directory)
            with contextlib.ExitStack() as stack:
                self._check(stack)
                old = self._put_in_place()
                sync(self.target.parent)
        except OSError as exc:
            raise DataError(f"{self.target} cannot be put in place: {exc.strerror}") from exc
        # a data node may serve it from now on, however long the removal takes
        self._unlock()
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def _put_in_place(self) -> Path | None:
        """Returns where the directory is that was there before."""
        if not self.target.exists():
            self.directory.rename(self.target)
            return None
        if exchange(self.directory, self.target):
            return self.directory
        replaced = self._new_name(self._replaced)
        self.target.rename(replaced)
        try:
            self.directory.rename(self.target)
        finally:
            if not self.target.exists():
                replaced.rename(self.target)
        return replaced

    def _own_directory(self) -> tuple[Path, int | None]:
        """A new directory beside the target, and the lock on it, where there are locks. Not by
        ``tempfile``, which makes such as only their owner can read: the user's umask decides who may, as
        for everything else that the user makes.
        """
        while True:
            path = self._new_name(self._staged)
            try:
                path.mkdir()
            except FileExistsError:
                continue
            try:
                handle = take(path, fcntl.LOCK_EX)
            except FileNotFoundError:
                # another run, removing what is stale, came between
                continue
            except OSError:
                return path, None
            if handle is not None:
                return path, handle

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _new_name(self, prefix: str) -> Path:
        return self.target.parent / f"{prefix}{secrets.token_hex(4)}"

    def _named(self, prefix: str) -> list[Path]:
        """What stands beside the target under such names; the last to be renamed comes first."""
        found = []
        for path in self.target.parent.iterdir() if self.target.parent.is_dir() else ():
            if path.name.startswith(prefix):
                with contextlib.suppress(FileNotFoundError):
                    found.append((path.stat().st_ctime_ns, path))
        return [path for _, path in sorted(found, reverse=True)]

    def _check(self, stack: contextlib.ExitStack) -> None:
        """Raise InputUnusable when the target is not to be replaced; ``stack`` keeps a node from beginning to
        serve it, or the holdout in it, meanwhile.
        """
        check_target(self.target, self._force)
        for directory in _datasets_in(self.target):
            try:
                handle = take(directory, fcntl.LOCK_EX)
            except OSError:
                # where there are no locks, nobody can be asked
                continue
            if handle is None:
                raise InputUnusable(
                    f"{directory} is being served by a data node, whose jobs would lose their data; stop "
                    "that node first, or prepare into another directory"
                )
            stack.callback(os.close, handle)

    def _restore(self) -> None:
        """Give back its name to what a killed run has taken away without putting anything in its place."""
        if self.target.exists():
            return
        for path in self._named(self._replaced):
            # where there are no locks: a run that is between its two renames now refuses to go on, then
            with _alone(path, without_locks=True) as free:
                if free:
                    path.rename(self.target)
                    sync(self.target.parent)
                    logger.warning(
                        "%s is there again: a run that was replacing it was killed half-way.", self.target
                    )
                    return

    def _remove_stale(self) -> None:
        for path in self._named(self._staged):
            with _alone(path) as free:
                if free:
                    shutil.rmtree(path, ignore_errors=True)
        for path in self._named(self._replaced):
            with _alone(path) as free:
                if free and self.target.exists():
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _alone(path: Path, without_locks: bool = False) -> Iterator[bool]:
    """Whether ``path`` is there and no other run is at work on it, nor will be while this lasts;
    ``without_locks`` where nothing can tell.
    """
    try:
        handle = take(path, fcntl.LOCK_EX)
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


def exchange(one: Path, other: Path) -> bool:
    """Let two directories change names, in one step that nothing can interrupt. False when that cannot be
    done, for whatever reason; two renames will say why.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    paths = [os.fsencode(path.absolute()) for path in (one, other)]
    status = renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], ctypes.c_uint(RENAME_EXCHANGE))
    return bool(status == 0)


def check_target(target: Path, force: bool) -> None:
    """Raise InputUnusable when no dataset may be put at ``target``, for all that its content says."""
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise InputUnusable(f"{target} is a file; name a directory that does not exist yet")
    entries = sorted(target.iterdir())
    if not entries:
        return
    if not force:
        raise InputUnusable(f"{target} exists already; name another directory, or replace it with --force")
    if (foreign := next((path for path in entries if not _prepared(path)), None)) is not None:
        raise InputUnusable(
            f"{target} holds {foreign.name}, which was not prepared by us; it is not replaced, even with "
            "--force"
        )


def _datasets_in(target: Path) -> Iterator[Path]:
    """The directories in ``target`` that a data node may serve: itself, and a holdout in each."""
    directory = target
    while directory.is_dir():
        yield directory
        if directory.is_symlink():
            # it might lead round in a circle
            return
        directory = directory / HOLDOUT


def _prepared(path: Path) -> bool:
    if path.name == HOLDOUT and path.is_dir():
        return all(_prepared(inner) for inner in path.iterdir())
    return path.is_file() and (path.name in (MANIFEST_FILE, LABELS_FILE) or path.suffix == SUFFIX)
