"""What is known of one round, for people: :class:`RoundRecord`, complete or as :class:`OpenRound` makes it
from what the round machine notes meanwhile; and the live page's messages that carry it.

:mod:`hypha.scheduler.status.history` keeps records as a job goes on; what the ledger has of a round takes
precedence over what they have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from msgspec import Struct

from hypha.journal import JournalEntry
from hypha.messages import (
    CloseRound,
    ExecutorClass,
    ExecutorError,
    ExecutorExited,
    LedgerRound,
    Loaded,
    ModelReady,
    Plan,
    RoundStarted,
    UpdateReceived,
    UpdateRefused,
)
from hypha.naming import names_of
from hypha.scheduler.rounds import events
from hypha.scheduler.rounds.failures import exit_text
from hypha.scheduler.status.snapshot import JobSnapshot

SpanKind = Literal["loading", "waiting", "training", "sending", "collecting", "outer-step", "broadcast"]
Key = tuple[int, int]
Redact = Callable[[str], str]

_MAX_FAULTS, _MAX_TEXT = 50, 200


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


def with_numbers(record: RoundRecord, entry: LedgerRound) -> RoundRecord:
    """``record`` with what the ledger has of the round."""
    counted = {part.worker: part for part in entry.contributors}
    parts = {part.worker: part for part in entry.left_out} | counted
    known = {worker.peer: worker for worker in record.workers}
    workers = []
    for peer in sorted(known.keys() | parts.keys()):
        worker = known.get(peer, WorkerRound(peer))
        if (part := parts.get(peer)) is not None:
            worker = msgspec.structs.replace(
                worker, samples=part.samples, batches=part.batches, loss=part.loss, counted=peer in counted
            )
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


def cleaned(fault: Fault, redact: Redact | None) -> Fault:
    """Without secrets, short, and text that can be written."""

    def clean(text: str) -> str:
        if redact is not None:
            text = redact(text)
        # shortened last: half a secret would not be recognised. File names may hold lone surrogates.
        return text[:_MAX_TEXT].encode("utf-8", "replace").decode()

    return msgspec.structs.replace(fault, what=clean(fault.what), text=clean(fault.text))


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

    def look_at_plan(self, now: float) -> None:
        """With all its batches done it sends its update."""
        if self.kind == "training" and self.plan is not None and self.batches >= self.plan:
            self.switch("sending", now)

    def switch(self, kind: SpanKind | None, now: float) -> None:
        """From now on it does ``kind``; nothing that is known with None."""
        if kind == self.kind:
            return
        if self.kind is not None and now > self.since:
            self.spans.append((self.kind, self.since, now))
        self.kind, self.since = kind, now

    def seen(self, began: float, now: float) -> tuple[Span, ...]:
        spans = list(self.spans)
        if self.kind is not None and now > self.since:
            spans.append((self.kind, self.since, now))
        return tuple(
            Span(kind, rounded(since - began), rounded(until - began)) for kind, since, until in spans
        )


@dataclass
class OpenRound:
    """The record that is under way; ``at`` of the machine's clock is its beginning. ``redact`` takes secrets
    out of what peers report and errors quote, before any of it is kept.
    """

    job_id: str
    generation: int
    round: int
    at: float
    began: float
    server: str = ""
    server_track: Track = field(default_factory=Track)
    tracks: dict[str, Track] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    redact: Redact | None = None
    #: who started the next round before it was opened here
    early: set[str] = field(default_factory=set)

    def record(self, now: float | None = None) -> RoundRecord:
        """As it is at ``now``, or at the last time of which anything is known."""
        if now is None:
            ends = [track.since for track in (*self.tracks.values(), self.server_track)]
            now = max(self.at, *ends, *(fault.at_s + self.at for fault in self.faults))
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

    def followed(self, round_: int, now: float, began: float) -> OpenRound:
        """The next one, ``round_``."""
        following = OpenRound(
            self.job_id, self.generation, round_, now, began, self.server, redact=self.redact
        )
        following.server_track.switch("broadcast", now)
        for peer, track in self.tracks.items():
            if track.kind is None:
                continue
            kept = following.tracks[peer] = Track()
            loading = track.kind == "loading"
            kept.switch("loading" if loading else "training" if peer in self.early else "waiting", now)
        following._look_at_broadcast(now)
        return following

    def note(self, entry: JournalEntry) -> None:
        for what in (entry.event, *entry.actions):
            self._take(what, entry.at_s)

    def _take(self, what: object, now: float) -> None:
        """An event of the round machine, or an action."""
        match what:
            case events.Joined(ref=ref, kind="train"):
                self.tracks.setdefault(ref.peer, Track()).switch("loading", now)
            case events.Joined(ref=ref):
                self.server = ref.peer
                self.server_track.switch("loading", now)
            case events.Told(sender=sender, kind=kind, stamp=stamp, event=event) if (
                stamp.generation == self.generation
            ):
                self._told(sender, kind, event, now)
            case events.Reported(sender=sender, progress=progress) if progress.round == self.round:
                track = self.tracks.get(sender)
                if track is not None and progress.batches > track.batches:
                    track.batches, track.loss = progress.batches, progress.loss
                    track.reported_at, track.batch_s = now, progress.busy_s / progress.batches
                    track.look_at_plan(now)
            case events.ParticipantLost(peer=peer, kind=kind, reason=reason):
                self._gone(peer, kind, "lost", reason, now)
            case events.JobRefused(peer=peer, reason=reason):
                self._fault(peer, "refused", reason, now)
            case events.Unreachable(peer=peer):
                self._fault(peer, "unreachable", "it cannot be reached; its lease has not expired", now)
            case events.Reachable(peer=peer):
                self._fault(peer, "reachable", "it answers again", now)
            case events.DataServed(served=False):
                self._fault("", "no data", "no data node serves the dataset", now)
            case events.Send(to=to, directive=Plan(round=number, batches=batches)) if number == self.round:
                if (track := self.tracks.get(to.peer)) is not None:
                    track.plan = batches
                    track.look_at_plan(now)
            case events.Send(directive=CloseRound()):
                self.server_track.switch("outer-step", now)
            case events.Drop(peer=peer, kind=kind, reason=reason):
                self._gone(peer, kind, "replaced", reason, now)
            case events.LetGo(peer=peer, kind=kind, reason=reason):
                self._gone(peer, kind, "left", reason, now)
            case events.Again(peer=peer, reason=reason):
                self._fault(peer, "executor started again", reason, now)
            case events.Restart(reason=reason):
                for track in (self.server_track, *self.tracks.values()):
                    track.switch(None, now)
                self._fault(self.server, "parameter server lost", reason, now)
            case events.Fail(error=error):
                self._fault("", "job failed", str(error), now)

    def _told(self, sender: str, kind: ExecutorClass, event: object, now: float) -> None:
        # an executor of an earlier generation goes on without having joined this one
        track = self.tracks.setdefault(sender, Track()) if kind == "train" else None
        match event:
            case Loaded() if track is not None and track.kind in (None, "loading"):
                track.switch("waiting", now)
            case RoundStarted(round=number) if track is not None:
                if number == self.round + 1:
                    self.early.add(sender)
                elif number == self.round:
                    track.batches, track.plan, track.batch_s = 0, None, 0.0
                    track.switch("training", now)
                    self._look_at_broadcast(now)
            case UpdateReceived(round=number, worker=worker, contribution=known) if number == self.round:
                if worker in self.tracks:
                    self.tracks[worker].sent(None if known is None else known.batches, now)
            case ModelReady() if kind == "aggregate":
                self.server = sender
                self.server_track.switch("collecting", now)
            case UpdateRefused(code="duplicate" | "stale"):
                pass  # a second copy, or one that came too late
            case UpdateRefused(worker=worker, code=code, reason=reason):
                self._fault(worker, f"update refused: {code}", reason, now)
            case ExecutorError():
                self._fault(sender, f"executor failed: {event.kind}", event.message, now)
            case ExecutorExited():
                self._fault(sender, "executor ended", exit_text(event), now)

    def _look_at_broadcast(self, now: float) -> None:
        """It has theta sent to everybody once nobody waits for it any more."""
        if self.server_track.kind == "broadcast" and not any(
            track.kind == "waiting" for track in self.tracks.values()
        ):
            self.server_track.switch("collecting", now)

    def _gone(self, peer: str, kind: ExecutorClass, what: str, reason: str, now: float) -> None:
        if kind == "train" and peer in self.tracks:
            self.tracks[peer].switch(None, now)
        elif kind == "aggregate" and peer == self.server:
            self.server_track.switch(None, now)
        self._fault(peer, what, reason, now)

    def _fault(self, peer: str, what: str, text: str, now: float) -> None:
        if len(self.faults) < _MAX_FAULTS:
            self.faults.append(cleaned(Fault(rounded(now - self.at), peer, what, text), self.redact))
