"""A directory appears whole or not at all: it is filled beside its place, made durable, then renamed.

Whoever is killed meanwhile leaves a hidden ``.<name>.preparing-*``, which nothing serves and the next
run removes; a lock on it tells that from one in use. A data node holds a lock on what it serves, so that
nothing is replaced under it: its jobs would ask for slices that are gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from hypha.data.manifest import MANIFEST_FILE
from hypha.data.slices import SUFFIX, sync
from hypha.errors import DataError, InputUnusable

LABELS_FILE = "labels.json"
HOLDOUT = "holdout"


class Staging:
    """``with Staging(target, force) as staging:`` fill ``staging.directory``, then ``staging.publish()``.

    Left without that, everything is removed. Raises DataError when the target may not be written.
    """

    def __init__(self, target: Path, force: bool) -> None:
        self.target = target.resolve()
        self._force = force
        with contextlib.ExitStack() as stack:
            self._check(stack)
        self._prefix = f".{self.target.name}.preparing-"
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            self.directory = self._beside()
        except OSError as exc:
            raise DataError(f"{self.target.parent} cannot be written: {exc.strerror}") from exc
        self._lock = os.open(self.directory, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._lock)

    def publish(self) -> None:
        """Put the directory in its place."""
        sync(self.directory)
        replaced = None
        with contextlib.ExitStack() as stack:
            self._check(stack)
            if self.target.exists():
                replaced = self._beside()
                self.target.rename(replaced)
            try:
                self.directory.rename(self.target)
            except OSError as exc:
                if replaced is not None:
                    replaced.rename(self.target)
                raise DataError(f"{self.target} cannot be put in place: {exc.strerror}") from exc
            sync(self.target.parent)
        if replaced is not None:
            shutil.rmtree(replaced)

    def _beside(self) -> Path:
        """A new directory beside the target. Not by ``tempfile``, which makes such as only their owner can
        read: the user's umask decides who may, as for everything else that the user makes.
        """
        while True:
            path = self.target.parent / f"{self._prefix}{secrets.token_hex(4)}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path

    def _check(self, stack: contextlib.ExitStack) -> None:
        """Raise InputUnusable when the target is not to be replaced; ``stack`` keeps a node from beginning to
        serve it meanwhile.
        """
        check_target(self.target, self._force)
        if self.target.is_dir() and not _locked(self.target, fcntl.LOCK_EX, stack):
            raise InputUnusable(
                f"{self.target} is being served by a data node, whose jobs would lose their data; stop that "
                "node first, or prepare into another directory"
            )

    def _remove_stale(self) -> None:
        for path in self.target.parent.glob(f"{self._prefix}*"):
            try:
                handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            else:
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)


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


@contextlib.contextmanager
def being_served(directories: Iterable[Path]) -> Iterator[None]:
    """While a data node serves these, ``prepare --force`` does not replace them."""
    with contextlib.ExitStack() as stack:
        for directory in directories:
            _locked(directory, fcntl.LOCK_SH, stack)
        yield


def _locked(directory: Path, how: int, stack: contextlib.ExitStack) -> bool:
    """Whether the lock is had, until ``stack`` is closed. Where there are no locks (some network file
    systems have none on directories), it counts as had.
    """
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return True
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _prepared(path: Path) -> bool:
    if path.name == HOLDOUT and path.is_dir():
        return all(_prepared(inner) for inner in path.iterdir())
    return path.is_file() and (path.name in (MANIFEST_FILE, LABELS_FILE) or path.suffix == SUFFIX)
