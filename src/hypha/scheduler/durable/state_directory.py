"""The job's state directory: one scheduler at a time, and never a half-deleted or foreign state in it."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Self

from hypha.errors import ConfigError, HyphaError, Problem

logger = logging.getLogger(__name__)

_STATE = (
    "job.db",
    "job.db-wal",
    "job.db-shm",
    "checkpoints",
    "incoming",
    "export",
    "ledger.json",
    "journal.jsonl",
    "history.jsonl",
)


class StateDirectory:
    """``<state_dir>/<job name>``, created 0700 and locked while this is open. :class:`HyphaError` when
    another scheduler holds it. A context manager.
    """

    def __init__(self, state_dir: Path, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            text = f"{name!r} is no job name: letters, digits, '.', '_' and '-', at most 100, please"
            raise ConfigError([Problem("scheduler.job.name", text)])
        self.path = state_dir / name
        self.ledger = self.path / "job.db"
        self.checkpoints = self.path / "checkpoints"
        self.incoming = self.path / "incoming"
        self.export = self.path / "export"
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise HyphaError(f"the state directory {self.path} cannot be used: {exc}") from exc
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(self._lock)
            raise HyphaError(
                f"another scheduler runs job {name} with the state directory {self.path}; "
                "stop it first, or give this job another name"
            ) from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Unlock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def export_of(self, generation: int) -> Path:
        """Where that generation's parameter server puts the trained model; no two get into each
        other's way.
        """
        return self.export / f"generation-{generation}"

    def prepare(self) -> None:
        """Make what is missing and empty what is only of one generation."""
        for directory in (self.incoming, self.export):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(mode=0o700)
        self.checkpoints.mkdir(mode=0o700, exist_ok=True)

    def move_aside(self, why: str) -> Path | None:
        """Rename an earlier job's state to ``old-<n>`` in here; ``None`` when there is none."""
        found = [self.path / name for name in _STATE if (self.path / name).exists()]
        if not found:
            return None
        number = 1
        while (self.path / f"old-{number}").exists():
            number += 1
        aside = self.path / f"old-{number}"
        aside.mkdir(mode=0o700)
        for path in found:
            path.rename(aside / path.name)
        logger.warning("%s: the earlier state was moved to %s", why, aside)
        return aside
