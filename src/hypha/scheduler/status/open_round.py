"""The record of the round that is under way: what each node does now, and since when."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypha.naming import names_of
from hypha.scheduler.status.round_record import (
    Fault,
    RoundRecord,
    Span,
    SpanKind,
    WorkerRound,
    rounded,
)


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
