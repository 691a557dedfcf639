"""The job's state directory: one scheduler at a time, and never a half-deleted or foreign state in it. And
the checkpoints there: kept whole or not at all, K deep, verified when loaded.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Self

from hypha.decoding import decode_json
from hypha.errors import ConfigError, HyphaError, Problem, Refused, Undecodable
from hypha.files import disks
from hypha.files.beneath import relative_path
from hypha.files.staging import move_directory, write_whole
from hypha.messages import CheckpointFile, CheckpointIndex, FileList, JobStamp, TransferMeta, encode_json
from hypha.net.bulk.files import hash_file

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
            (self.path / "lock").touch(mode=0o600)
            self._lock = disks.lock(self.path / "lock", fcntl.LOCK_EX)
        except OSError as exc:
            raise HyphaError(f"the state directory {self.path} cannot be used: {exc}") from exc
        if self._lock is None:
            raise HyphaError(
                f"another scheduler runs job {name} with the state directory {self.path}; "
                "stop it first, or give this job another name"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

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


INDEX = "index.json"


def safe_relative(name: str) -> PurePosixPath:
    """``name`` as a path that stays inside a directory; :class:`Refused` otherwise."""
    try:
        path = relative_path(name)
    except ValueError as exc:
        raise Refused("invalid", f"{name!r} is no file name") from exc
    if path.name == INDEX:
        raise Refused("invalid", f"{name!r} is no file name")
    return path


class CheckpointStore:
    """The checkpoints of one job in its state directory. All methods block (files, hashes): call them in a
    thread.

    Files arrive in ``incoming/``, each generation of the job apart: what a dead parameter server left
    half-way may still be waited for, and must not stand in its successor's way. When the parameter server
    reports that the checkpoint of a round is complete, its files get an index with sizes and BLAKE3 hashes
    and become ``checkpoints/round-N`` in one rename.
    """

    def __init__(self, state: StateDirectory, job_id: str, keep: int) -> None:
        self.state = state
        self.job_id = job_id
        self._keep = keep
        #: by generation and round
        self._arrived: dict[tuple[int, int], dict[str, TransferMeta]] = {}

    def _directory(self, round_: int) -> Path:
        return self.state.checkpoints / f"round-{round_}"

    def _incoming(self, stamp: tuple[int, int]) -> Path:
        return self.state.incoming / "generation-{}-round-{}".format(*stamp)

    def place_for(self, meta: TransferMeta) -> Path:
        """Where an offered file is to be written; what was never finished is deleted."""
        generation, round_ = stamp = _stamp(meta)
        for stale in [key for key in self._arrived if key[0] < generation or key[1] < round_ - 1]:
            del self._arrived[stale]
            shutil.rmtree(self._incoming(stale), ignore_errors=True)
        path = self._incoming(stamp) / safe_relative(meta.name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    def arrived(self, meta: TransferMeta) -> None:
        """A file is here, verified by its transfer."""
        self._arrived.setdefault(_stamp(meta), {})[str(safe_relative(meta.name))] = meta

    def complete(self, round_: int) -> bool:
        """The parameter server reports that all files for ``round_`` were sent. False: they are not here."""
        stamped = [key for key in self._arrived if key[1] == round_]
        if not stamped:
            return self._directory(round_).is_dir()
        stamp = max(stamped)
        files = self._arrived.pop(stamp)
        listed = tuple(
            CheckpointFile(name=name, size=meta.size, blake3=meta.blake3)
            for name, meta in sorted(files.items())
        )
        index = CheckpointIndex(job_id=self.job_id, round=round_, files=listed, generation=stamp[0])
        self.adopt(index, self._incoming(stamp))
        return True

    def adopt(self, index: CheckpointIndex, source: Path) -> None:
        """The files in ``source``, durable and verified, become the checkpoint."""
        write_whole(source / INDEX, encode_json(index), durable=True)
        move_directory(source, self._directory(index.round))

    def path(self, round_: int, name: str) -> Path:
        return self._directory(round_) / safe_relative(name)

    def returning(self, round_: int) -> Path:
        """Where the files of a lost checkpoint come back to before :meth:`adopt`."""
        return self.state.incoming / f"returning-{round_}"

    def outdated(self, rounds: Iterable[int]) -> list[int]:
        """All but the newest K of ``rounds``. They are to be forgotten before they are deleted: what the
        ledger names is there, whenever its scheduler is killed.
        """
        return sorted(rounds, reverse=True)[self._keep :]

    def keep_only(self, rounds: Collection[int]) -> None:
        """Delete the checkpoints of all other rounds, and what a scheduler forgot before it was killed."""
        for path in self.state.checkpoints.glob("round-*"):
            if path.name.removeprefix("round-") not in {str(round_) for round_ in rounds}:
                shutil.rmtree(path, ignore_errors=True)

    def verify(self, round_: int) -> bool:
        """Is the checkpoint for ``round_`` here, and are its bytes those that arrived?"""
        directory = self._directory(round_)
        try:
            index = decode_json((directory / INDEX).read_bytes(), CheckpointIndex)
            for entry in index.files:
                path = directory / safe_relative(entry.name)
                if path.stat().st_size != entry.size or hash_file(path)[1] != entry.blake3:
                    raise HyphaError(f"{path} has changed since it was written")
        except (OSError, HyphaError) as exc:
            logger.error("The checkpoint in %s cannot be used: %s", directory, exc)
            return False
        return bool(index.files) and index.job_id == self.job_id

    def files(self, round_: int) -> FileList:
        """What a restoring parameter server pulls; names are ``<round>/<file>``. :class:`Refused`."""
        return FileList(files=tuple(checkpoint_meta(round_, one) for one in self.index(round_).files))

    def file(self, name: str) -> tuple[Path, TransferMeta]:
        """The file ``<round>/<file>``. :class:`Refused`."""
        number, _, file = name.partition("/")
        if number.isdecimal():
            for meta in self.files(int(number)).files:
                if meta.name == name:
                    return self.path(int(number), file), meta
        raise Refused("not-found", f"there is no checkpoint file {name}")

    def index(self, round_: int) -> CheckpointIndex:
        """What the checkpoint for ``round_`` consists of. :class:`Refused` when there is none."""
        try:
            return decode_json((self._directory(round_) / INDEX).read_bytes(), CheckpointIndex)
        except (OSError, Undecodable) as exc:
            raise Refused("not-found", f"there is no checkpoint for round {round_}") from exc


def checkpoint_meta(round_: int, file: CheckpointFile, stamp: JobStamp | None = None) -> TransferMeta:
    """Of one of the files from which ``round_`` is started, on its way."""
    name = f"{round_}/{file.name}"
    return TransferMeta(kind="checkpoint", name=name, size=file.size, blake3=file.blake3, stamp=stamp)


def _stamp(meta: TransferMeta) -> tuple[int, int]:
    return (meta.stamp.generation, meta.stamp.round) if meta.stamp is not None else (0, 0)
