"""What is known of one round, for people: :class:`RoundRecord`; and the live page's messages that carry it.

:mod:`hypha.scheduler.status.history` makes records as a job goes on; what the ledger says of a round goes
before what they say.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

from hypha.messages import Contribution, LedgerRound
from hypha.scheduler.status.snapshot import JobSnapshot

SpanKind = Literal["loading", "waiting", "training", "sending", "collecting", "outer-step", "broadcast"]
Key = tuple[int, int]


class Span(Struct, frozen=True, array_like=True):
    """What somebody did, in seconds since the record began."""

    kind: SpanKind
    from_s: float
    to_s: float


class Fault(Struct, frozen=True, array_like=True):
    """Something that went wrong, or was done about it, ``at_s`` seconds after the record began."""

    at_s: float
    peer: str
    what: str
    text: str


class WorkerRound(Struct, frozen=True, omit_defaults=True):
    """A worker's part of a round. ``counted``: its update is in the mean."""

    peer: str
    samples: int = 0
    batches: int = 0
    loss: float | None = None
    counted: bool = False
    spans: tuple[Span, ...] = ()


class RoundRecord(Struct, frozen=True, omit_defaults=True):
    """One round of one generation (``generation``) of a job.

    ``began`` is in seconds since 1970; ``length_s`` is how long the record is, which for the first round of a
    generation includes the loading of models; ``duration_s`` is the round itself, as in the ledger. A record
    that is neither ``applied`` nor the open round's was cut short, and one that is ``discarded`` was done
    again. ``names`` are those of the certificates of the nodes in it, by PeerID, as far as they are known.
    """

    job_id: str
    generation: int
    round: int
    began: float
    length_s: float = 0.0
    duration_s: float = 0.0
    samples: int = 0
    loss: float | None = None
    update_norm: float = 0.0
    applied: bool = False
    discarded: bool = False
    server: str = ""
    workers: tuple[WorkerRound, ...] = ()
    server_spans: tuple[Span, ...] = ()
    faults: tuple[Fault, ...] = ()
    names: dict[str, str] = {}

    @property
    def key(self) -> Key:
        """What it is known by within its job."""
        return self.generation, self.round


class Past(Struct, frozen=True):
    """What a viewer receives first, and again when an earlier scheduler's rounds have been read: all records
    that are kept, the oldest first. The event ``past`` of the live page.
    """

    rounds: tuple[RoundRecord, ...]


class Now(Struct, frozen=True):
    """What a viewer receives from then on, about twice a second. ``rounds`` are the records that are new or
    have changed since the message before, ``open`` is the round that is under way. The event ``now`` of the
    live page. A viewer that reads slowly receives fewer of them, and misses nothing.
    """

    job: JobSnapshot
    rounds: tuple[RoundRecord, ...] = ()
    open: RoundRecord | None = None


def without_spans(record: RoundRecord) -> RoundRecord:
    """Its numbers alone; newer records, and the job's state, have the same names."""
    workers = tuple(msgspec.structs.replace(worker, spans=()) for worker in record.workers)
    return msgspec.structs.replace(record, workers=workers, server_spans=(), names={})


def from_ledger(entry: LedgerRound, job_id: str, began: float = 0.0) -> RoundRecord:
    """The numbers of a round of which nothing else is known."""
    record = RoundRecord(job_id, entry.generation, entry.round, began, length_s=rounded(entry.duration_s))
    return with_numbers(record, entry)


def with_numbers(record: RoundRecord, entry: LedgerRound) -> RoundRecord:
    """``record`` with what the ledger says of the round."""
    counted = {part.worker: part for part in entry.contributors}
    parts = {part.worker: part for part in entry.left_out} | counted
    known = {worker.peer: worker for worker in record.workers}
    workers = []
    for peer in sorted(known.keys() | parts.keys()):
        worker = known.get(peer, WorkerRound(peer))
        if peer in parts:
            worker = _with_part(worker, parts[peer], peer in counted)
        workers.append(worker)
    return msgspec.structs.replace(
        record,
        duration_s=rounded(entry.duration_s),
        samples=entry.samples,
        loss=entry.loss,
        update_norm=entry.update_norm,
        applied=True,
        discarded=entry.discarded or record.discarded,
        workers=tuple(workers),
    )


def _with_part(worker: WorkerRound, part: Contribution, counted: bool) -> WorkerRound:
    return msgspec.structs.replace(
        worker, samples=part.samples, batches=part.batches, loss=part.loss, counted=counted
    )


def rounded(seconds: float) -> float:
    """Milliseconds are enough for a picture."""
    return round(max(0.0, seconds), 3)
