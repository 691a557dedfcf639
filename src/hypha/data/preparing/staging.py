"""A dataset's directory appears whole or not at all, and never under a node that serves what it replaces.

It is staged as :mod:`hypha.files.staging` does: whoever is killed meanwhile leaves what nothing serves and
the next run removes. A data node holds a lock on what it serves, so that nothing is replaced under it: its
jobs would ask for slices that are gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from hypha.data.manifest import HOLDOUT, LABELS_FILE, MANIFEST_FILE
from hypha.data.slices import SUFFIX
from hypha.errors import DataError, InputUnusable
from hypha.files.disks import lock
from hypha.files.staging import StagedDirectory, restore


class Staging(StagedDirectory):
    """A staged directory that raises DataError when the target may not be written."""

    def __init__(self, target: Path, force: bool) -> None:
        self._force = force
        target = target.resolve()
        try:
            restore(target)
            with _unserved(target, force):
                pass
            super().__init__(target, durable=True)
        except OSError as exc:
            raise DataError(f"{target.parent} cannot be written: {exc.strerror}") from exc

    def publish(self, replace: bool = True, before: Callable[[], None] = lambda: None) -> None:
        try:
            with _unserved(self.target, self._force):
                super().publish(replace, before)
        except OSError as exc:
            raise DataError(f"{self.target} cannot be put in place: {exc.strerror}") from exc


@contextlib.contextmanager
def _unserved(target: Path, force: bool) -> Iterator[None]:
    """Keeps a node from beginning to serve the target, or the holdout in it, meanwhile. Raises InputUnusable
    when the target is not to be replaced.
    """
    check_target(target, force)
    with contextlib.ExitStack() as stack:
        for directory in _datasets_in(target):
            try:
                handle = lock(directory, fcntl.LOCK_EX)
            except OSError:
                # where there are no locks, nobody can be asked
                continue
            if handle is None:
                raise InputUnusable(
                    f"{directory} is being served by a data node, whose jobs would lose their data; stop "
                    "that node first, or prepare into another directory"
                )
            stack.callback(os.close, handle)
        yield


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
