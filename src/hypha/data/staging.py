"""A directory appears whole or not at all: it is filled beside its place, made durable, then renamed.

Whoever is killed meanwhile leaves a hidden ``.<name>.preparing-*``, which nothing serves and the next
run removes; a lock on it tells that from one in use.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from hypha.data.manifest import MANIFEST_FILE
from hypha.data.slices import SUFFIX, sync
from hypha.errors import DataError

LABELS_FILE = "labels.json"
HOLDOUT = "holdout"


class Staging:
    """``with Staging(target, force) as staging:`` fill ``staging.directory``, then ``staging.publish()``.

    Left without that, everything is removed. Raises DataError when the target may not be written.
    """

    def __init__(self, target: Path, force: bool) -> None:
        self.target = target.resolve()
        self._force = force
        self._check()
        self._prefix = f".{self.target.name}.preparing-"
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            self.directory = Path(tempfile.mkdtemp(prefix=self._prefix, dir=self.target.parent))
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
        self.directory.chmod(0o755)
        sync(self.directory)
        replaced = None
        self._check()
        if self.target.exists():
            replaced = Path(tempfile.mkdtemp(prefix=self._prefix, dir=self.target.parent))
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

    def _check(self) -> None:
        if not self.target.exists() and not self.target.is_symlink():
            return
        if not self.target.is_dir():
            raise DataError(f"{self.target} is a file; name a directory that does not exist yet")
        entries = sorted(self.target.iterdir())
        if not entries:
            return
        if not self._force:
            raise DataError(f"{self.target} exists already; name another directory, or replace it by force")
        if (foreign := next((path for path in entries if not _prepared(path)), None)) is not None:
            raise DataError(
                f"{self.target} holds {foreign.name}, which was not prepared by us; it is not replaced, "
                "even by force"
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


def _prepared(path: Path) -> bool:
    if path.name == HOLDOUT and path.is_dir():
        return all(_prepared(inner) for inner in path.iterdir())
    return path.is_file() and (path.name in (MANIFEST_FILE, LABELS_FILE) or path.suffix == SUFFIX)
