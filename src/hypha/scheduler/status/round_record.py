"""What is known of one round, for people: :class:`RoundRecord`, complete or as :class:`OpenRound` makes it
while the round is under way; and the live page's messages that carry it.

:mod:`hypha.scheduler.status.history` makes records as a job goes on; what the ledger has of a round takes
precedence over what they have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec
from msgspec import Struct

from hypha.messages import Contribution, LedgerRound
from hypha.naming import names_of
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
    """``record`` with what the ledger has of the round."""
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


@dataclass
class Track:
    """Spans of one node in the open record, in seconds of the machine's clock."""

    kind: SpanKind | None = None
    since: float = 0.0
    spans: list[tuple[SpanKind, float, float]] = field(default_factory=list)
    batches: int = 0
    plan: int | None = None
    loss: float | None = None
    reported_at: float = 0.0
    batch_s: float = 0.0

    def sent(self, batches: int | None, now: float) -> None:
        """Its update of ``batches`` has arrived. Its last report may be older than its last batch: when that
        ended is computed from how long its batches take.
        """
        if self.kind == "training" and self.batch_s:
            left = max(0, (self.plan or self.batches if batches is None else batches) - self.batches)
            self.switch("sending", max(self.since, min(now, self.reported_at + left * self.batch_s)))
        self.switch("waiting", now)

    def switch(self, kind: SpanKind | None, now: float) -> None:
        """From now on it does ``kind``; nothing that is known with None."""
        if kind == self.kind:
            return
        if self.kind is not None and now > self.since:
            self.spans.append((self.kind, self.since, now))
        self.kind, self.since = kind, now

    def seen(self, began: float, now: float) -> tuple[Span, ...]:
        """All of it up to ``now``."""
        spans = list(self.spans)
        if self.kind is not None and now > self.since:
            spans.append((self.kind, self.since, now))
        return tuple(
            Span(kind, rounded(since - began), rounded(until - began)) for kind, since, until in spans
        )


@dataclass
class OpenRound:
    """The record that is under way; ``at`` of the machine's clock is its beginning."""

    job_id: str
    generation: int
    round: int
    at: float
    began: float
    server: str = ""
    server_track: Track = field(default_factory=Track)
    tracks: dict[str, Track] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def record(self, now: float) -> RoundRecord:
        """As it is at ``now``."""
        return RoundRecord(
            job_id=self.job_id,
            generation=self.generation,
            round=self.round,
            began=self.began,
            length_s=rounded(now - self.at),
            server=self.server,
            workers=tuple(
                WorkerRound(peer, batches=track.batches, loss=track.loss, spans=track.seen(self.at, now))
                for peer, track in sorted(self.tracks.items())
            ),
            server_spans=self.server_track.seen(self.at, now),
            faults=tuple(self.faults),
            names=names_of([*self.tracks, self.server, *(fault.peer for fault in self.faults)]),
        )
