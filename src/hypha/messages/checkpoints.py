"""Checkpoints, and copies of them that workers keep."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from hypha.messages.values import Id, JobStamp, Message, Value


class CheckpointFile(Value):
    """A file of a checkpoint; ``name`` is relative to the checkpoint, ``blake3`` hex."""

    name: str
    size: int
    blake3: str


class CheckpointIndex(Value):
    """``index.json``: all files of the checkpoint from which ``round`` is started, and the generation of the
    job that saved it. ``signature`` (hex) is that of the scheduler which left a copy with a worker: by it the
    scheduler knows the copy again when it has lost its ledger (:mod:`hypha.scheduler.durable.replicas`).
    """

    job_id: Id
    round: int
    files: tuple[CheckpointFile, ...]
    generation: int = 0
    signature: Annotated[str, Meta(max_length=256)] = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


_REPLICAS = "checkpoints/"


def replica_name(scheduler: str, job: str) -> str:
    """Under which name workers that keep copies of the scheduler's job are found, as a dataset is."""
    return f"{_REPLICAS}{scheduler}/{job}"


def is_replica_name(name: str) -> bool:
    """Whether ``name`` is one of :func:`replica_name`, and not that of a dataset."""
    return name.startswith(_REPLICAS)


class HoldCheckpoint(Message):
    """A scheduler asks a worker to keep a copy of a checkpoint of its job called ``job``. Of the job's other
    rounds only those of ``keep`` are to stay. Said again when the files that the answer misses were sent, in
    bulk (kind ``checkpoint``, name ``<round>/<file>``): with none missing the copy is complete.
    """

    stamp: JobStamp
    job: str
    index: CheckpointIndex
    keep: tuple[int, ...] = ()


class CheckpointHeld(Message):
    """Names of the files that are still ``missing``; the copy is complete and durable when none is."""

    missing: tuple[str, ...] = ()


class DropCheckpoints(Message):
    """No copy of that job's checkpoints is needed any more."""

    job_id: Id


class FindCheckpoints(Message):
    """Which copies of checkpoints of the caller's job called ``job`` are there?"""

    job: str


class CheckpointList(Message):
    """Complete copies, the newest round of each job first."""

    found: tuple[CheckpointIndex, ...] = ()
