"""Copies of checkpoints that a worker keeps for schedulers: whole, bounded, and there after a restart.

``<directory>/<job id>/round-<N>`` is a complete copy: the checkpoint's files and ``index.json``. It got its
name by one rename, when every file had arrived durable and verified, so nothing that was cut looks like
one. A copy belongs to the PeerID that asked for it: nobody else can read, replace or drop it. It outlives
leases and this process; what nobody asks about for long is deleted. All methods block: call them in a
thread.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import Struct

from hypha.config.models import StorageConfig
from hypha.decoding import decode_json
from hypha.errors import Refused, Undecodable
from hypha.files.beneath import relative_path
from hypha.files.disks import is_disk_full, sync
from hypha.files.staging import move_directory, write_whole
from hypha.messages import CheckpointFile, CheckpointIndex, HoldCheckpoint, TransferMeta, encode_json
from hypha.runtime import wall_time

logger = logging.getLogger("hypha.worker.storage")

GB = 10**9
INDEX, OWNER = "index.json", "owner.json"
MAX_FILES = 1024
#: Of all copies together, however small they are: what is known of each is in memory.
MAX_FILES_KEPT = 50_000
#: of a file's name in a copy, and of a job's
MAX_NAME_LENGTH = 255
_DAY_S = 86400.0
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,149}")
_HASH = re.compile(r"[0-9a-f]{64}")


class Owner(Struct, frozen=True):
    """``owner.json``: whose copies they are, and of which job."""

    peer: str
    job: str
    job_id: str


@dataclass
class _Job:
    owner: Owner
    path: Path
    used_at: float
    generation: int = 0
    complete: dict[int, CheckpointIndex] = field(default_factory=dict)
    #: of the copy that is on its way
    incoming: CheckpointIndex | None = None

    @property
    def coming_to(self) -> Path:
        return self.path / "incoming"

    def round(self, number: int) -> Path:
        return self.path / f"round-{number}"


class ReplicaStore:
    """``directory`` belongs to this worker alone."""

    def __init__(self, directory: Path, config: StorageConfig) -> None:
        self._directory = directory
        #: what the owner offers
        self.max_bytes = int(config.checkpoints_gb * GB)
        self._max_age_s = config.keep_days * _DAY_S
        self._leased: frozenset[str] = frozenset()
        #: whoever calls a private method holds it
        self._lock = threading.Lock()
        self._jobs: dict[str, _Job] = {}
        if directory.is_dir():
            for path in directory.iterdir():
                self._load(path)
        self._forget_old()

    @property
    def used_bytes(self) -> int:
        """Bytes of all copies, those on their way included."""
        return sum(index.size for index in self._copies())

    @property
    def owners(self) -> frozenset[tuple[str, str]]:
        """PeerID and job name of every job that has a complete copy here."""
        return frozenset((job.owner.peer, job.owner.job) for job in self._jobs.values() if job.complete)

    def hold(self, caller: str, request: HoldCheckpoint, leased: frozenset[str]) -> tuple[str, ...]:
        """Take note of a copy that is to come; which of its files are missing. With none missing it is
        complete and durable. ``leased``: the schedulers that hold a lease here now. :class:`Refused` when
        it may not come.
        """
        index = request.index
        _check(request)
        with self._lock, _disk(self._directory):
            self._leased = leased
            job = self._jobs.get(index.job_id)
            if job is not None:
                self._owned(job, caller)
                if request.stamp.generation < job.generation:
                    raise Refused("stale", f"generation {job.generation} of the job has been here")
                if job.complete.get(index.round) == index:
                    self._touch(job)
                    self._prune(job, {*request.keep, index.round})
                    return ()
            if not self.max_bytes:
                text = "this worker's owner offers no storage for checkpoints (storage.checkpoints_gb)"
                raise Refused("not-allowed", text)
            if caller not in leased:
                raise Refused("lease", "only who holds a lease here may leave a checkpoint")
            if job is None:
                job = self._open(Owner(caller, request.job, index.job_id), index)
            job.generation = request.stamp.generation
            if job.incoming != index:
                self._expect(job, index, {*request.keep, index.round})
            # a file has its name once it is verified
            missing = tuple(file.name for file in index.files if not (job.coming_to / file.name).is_file())
            if not missing:
                self._complete(job, index)
                self._prune(job, {*request.keep, index.round})
            return missing

    def place_for(self, caller: str, meta: TransferMeta) -> Path:
        """Where a file of a copy is to be written. :class:`Refused` when nobody announced it."""
        with self._lock:
            job, file = self._announced(caller, meta)
            path = job.coming_to / file.name
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._touch(job)
            return path

    def arrived(self, caller: str, meta: TransferMeta) -> None:
        """It lies there, verified and durable. :class:`Refused` when it is not wanted any more."""
        with self._lock:
            self._announced(caller, meta)

    def find(self, caller: str, job_name: str) -> tuple[CheckpointIndex, ...]:
        """The complete copies of the caller's jobs of that name, the newest round of each job first."""
        with self._lock:
            jobs = [
                one for one in self._jobs.values() if (one.owner.peer, one.owner.job) == (caller, job_name)
            ]
            for job in jobs:
                self._touch(job)
            jobs.sort(key=lambda job: job.used_at, reverse=True)
            return tuple(
                job.complete[round_] for job in jobs for round_ in sorted(job.complete, reverse=True)
            )

    def file(self, caller: str, job_id: str, name: str) -> tuple[Path, TransferMeta]:
        """The file ``<round>/<file>`` of a complete copy. :class:`Refused`."""
        number, _, rest = name.partition("/")
        with self._lock:
            job = self._jobs.get(job_id)
            if job is not None and number.isdecimal() and int(number) in job.complete:
                self._owned(job, caller)
                for file in job.complete[int(number)].files:
                    if file.name == rest:
                        self._touch(job)
                        meta = TransferMeta(kind="checkpoint", name=name, size=file.size, blake3=file.blake3)
                        return job.round(int(number)) / file.name, meta
        raise Refused("not-found", f"there is no copy of the checkpoint file {name} of job {job_id} here")

    def drop(self, caller: str, job_id: str) -> None:
        """Delete all copies of the caller's job."""
        with self._lock:
            job = self._jobs.get(job_id)
            if job is not None:
                self._owned(job, caller)
                self._forget(job)

    def _copies(self) -> Iterator[CheckpointIndex]:
        """Those on their way included."""
        for job in self._jobs.values():
            yield from job.complete.values()
            if job.incoming is not None:
                yield job.incoming

    def _owned(self, job: _Job, caller: str) -> None:
        if job.owner.peer != caller:
            raise Refused("uninvited", f"the copies of job {job.owner.job_id} belong to another scheduler")

    def _announced(self, caller: str, meta: TransferMeta) -> tuple[_Job, CheckpointFile]:
        job = self._jobs.get(meta.stamp.job_id) if meta.stamp is not None else None
        if job is not None and job.incoming is not None and meta.stamp is not None:
            self._owned(job, caller)
            if meta.stamp.generation < job.generation:
                raise Refused("stale", f"generation {job.generation} of the job has been here")
            for file in job.incoming.files:
                announced = (f"{job.incoming.round}/{file.name}", file.size, file.blake3)
                if (meta.name, meta.size, meta.blake3) == announced:
                    return job, file
        raise Refused("uninvited", f"nobody announced the checkpoint file {meta.name}")

    def _open(self, owner: Owner, index: CheckpointIndex) -> _Job:
        job = _Job(owner, self._directory / owner.job_id, wall_time())
        self._make_space(job, index)
        job.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(job.path / OWNER, encode_json(owner), durable=True)
        sync(self._directory)
        self._jobs[owner.job_id] = job
        return job

    def _expect(self, job: _Job, index: CheckpointIndex, keep: set[int]) -> None:
        """Make space, and begin; what was on its way before is given up."""
        job.incoming = None
        shutil.rmtree(job.coming_to, ignore_errors=True)
        if any(round_ in keep and round_ != index.round for round_ in job.complete):
            # another content of the same round is of a generation that does not count any more
            self._prune(job, keep - {index.round})
        self._make_space(job, index)
        job.coming_to.mkdir(mode=0o700)
        job.incoming = index
        self._touch(job)

    def _make_space(self, job: _Job, index: CheckpointIndex) -> None:
        """:class:`Refused` when the owner does not offer so much, or somebody else has it."""
        self._forget_old()
        for other in list(self._jobs.values()):
            # announced by somebody who will not send it any more
            if other.incoming is not None and other is not job and other.owner.peer not in self._leased:
                other.incoming = None
                shutil.rmtree(other.coming_to, ignore_errors=True)
        if sum(len(copy.files) for copy in self._copies()) + len(index.files) > MAX_FILES_KEPT:
            raise Refused("no-space", f"this worker keeps {MAX_FILES_KEPT} files of checkpoints at most")
        needed, free = index.size, self.max_bytes - self.used_bytes
        if needed > free:
            raise Refused(
                "no-space",
                f"a checkpoint of {needed} bytes does not fit: of the {self.max_bytes} bytes that this "
                f"worker's owner offers (storage.checkpoints_gb) {max(0, free)} are free",
            )

    def _complete(self, job: _Job, index: CheckpointIndex) -> None:
        source = job.coming_to
        write_whole(source / INDEX, encode_json(index), durable=True)
        job.complete.pop(index.round, None)
        move_directory(source, job.round(index.round))
        job.incoming = None
        job.complete[index.round] = index
        self._touch(job)
        logger.info(
            "Keeping a copy of the checkpoint for round %d (%d bytes).",
            index.round,
            index.size,
            extra={"job_id": index.job_id, "peer_id": job.owner.peer},
        )

    def _prune(self, job: _Job, keep: set[int]) -> None:
        for round_ in [one for one in job.complete if one not in keep]:
            del job.complete[round_]
            _remove(job.round(round_))

    def _touch(self, job: _Job) -> None:
        job.used_at = wall_time()
        os.utime(job.path)

    def _forget(self, job: _Job) -> None:
        del self._jobs[job.owner.job_id]
        (job.path / OWNER).unlink(missing_ok=True)
        shutil.rmtree(job.path, ignore_errors=True)

    def _forget_old(self) -> None:
        for job in list(self._jobs.values()):
            if wall_time() - job.used_at > self._max_age_s and job.owner.peer not in self._leased:
                logger.warning(
                    "Nobody has asked about the copies of job %s for long; they are deleted.",
                    job.owner.job_id,
                    extra={"job_id": job.owner.job_id, "peer_id": job.owner.peer},
                )
                self._forget(job)

    def _load(self, path: Path) -> None:
        """What an earlier process kept at ``path``; what is not whole is deleted."""
        try:
            owner = decode_json((path / OWNER).read_bytes(), Owner)
        except (OSError, Undecodable) as exc:
            logger.warning("%s holds no copies of checkpoints and is deleted: %s", path, exc)
            shutil.rmtree(path, ignore_errors=True)
            return
        job = _Job(owner, path, path.stat().st_mtime)
        for inside in path.iterdir():
            if not inside.is_dir():
                continue
            try:
                index = decode_json((inside / INDEX).read_bytes(), CheckpointIndex)
                whole = inside.name == f"round-{index.round}" and all(
                    (inside / file.name).stat().st_size == file.size for file in index.files
                )
            except (OSError, Undecodable):
                whole = False
            if whole:
                job.complete[index.round] = index
            else:
                shutil.rmtree(inside, ignore_errors=True)
        self._jobs[owner.job_id] = job


@contextmanager
def _disk(directory: Path) -> Iterator[None]:
    """An error of the disk, as a refusal."""
    try:
        yield
    except OSError as exc:
        logger.error("%s cannot be written: %s", directory, exc)
        raise Refused(
            "no-space" if is_disk_full(exc) else "internal", f"its storage cannot be written: {exc}"
        ) from exc


def _remove(directory: Path) -> None:
    """Cut short, it does not look whole."""
    (directory / INDEX).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _check(request: HoldCheckpoint) -> None:
    """:class:`Refused` for what is no checkpoint, or would lead out of our directory."""
    index = request.index
    named = 0 < len(request.job) <= MAX_NAME_LENGTH
    if request.stamp.job_id != index.job_id or not _JOB_ID.fullmatch(index.job_id) or not named:
        raise Refused("malformed", f"{index.job_id!r} is not the id of the job that the request is about")
    if index.round < 0 or not 0 < len(index.files) <= MAX_FILES:
        raise Refused("malformed", f"a checkpoint has a round, and 1 to {MAX_FILES} files")
    names = {file.name for file in index.files}
    if len(names) != len(index.files):
        raise Refused("malformed", "two files of the checkpoint have one name")
    for file in index.files:
        if not _is_file_name(file.name):
            raise Refused("invalid", f"{file.name!r} is no name for a file of a checkpoint")
        if file.size < 0 or not _HASH.fullmatch(file.blake3):
            raise Refused("malformed", f"{file.name} needs a size and a BLAKE3 hash")


def _is_file_name(name: str) -> bool:
    try:
        path = relative_path(name)
    except ValueError:
        return False
    plain = str(path) == name and name != INDEX and not name.endswith(".part")
    return plain and len(name.encode()) <= MAX_NAME_LENGTH
