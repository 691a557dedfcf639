"""What a job leaves: the ledger (``ledger.json``), enough to do it again, and checkpoints, of which workers
keep copies.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from hypha.messages.data import Manifest
from hypha.messages.events import Contribution, UpdateStatistics
from hypha.messages.jobs import AggregateJob, TrainJob
from hypha.messages.values import Id, JobStamp, Message, Value


class LedgerRound(Value):
    """One outer step. ``theta`` is the hash of theta of ``round + 1``, that is, after this step (as in
    :class:`RoundApplied`). ``contributors`` are in the mean; ``left_out``, which only earlier versions wrote,
    trained but are not. ``generation`` is the job's generation; after a restore from a checkpoint rounds
    occur again under a higher one, and the earlier ones are ``discarded``.
    """

    round: int
    theta: str
    contributors: tuple[Contribution, ...]
    left_out: tuple[Contribution, ...] = ()
    generation: int = 0
    discarded: bool = False
    samples: int = 0
    loss: float = 0.0
    update_norm: float = 0.0
    #: from theta_r at the parameter server to its being applied
    duration_s: float = 0.0
    #: what was measured of each contributor's update; earlier versions kept nothing of it
    updates: tuple[UpdateStatistics, ...] = ()


class LedgerFile(Value):
    """``ledger.json``. ``job`` and ``aggregate`` are the descriptions as dispatched, without tokens;
    their ``me`` is empty and ``job.batch_size`` 0, as these differ by worker (see each Contribution).
    ``theta`` is the hash of theta of round 0; ``rounds`` are in the order in which they happened.
    """

    job: TrainJob
    aggregate: AggregateJob
    manifest: Manifest
    manifest_hash: str
    theta: str
    rounds: tuple[LedgerRound, ...]
    version: int = 1


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
