"""A worker as the round machine sees it: what it said, what it was told, how fast it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from hypha.messages import Contribution, PeerRef, Progress
from hypha.scheduler.projection import BatchTime, Pace

#: longest time that a silent worker is believed to go on at its pace, if its batches are shorter
_BELIEVED_S = 1.0

MemberState = Literal[
    "loading", "waiting", "training", "scheduled", "updating", "synchronised", "left-out", "unreachable"
]


@dataclass
class Member:
    """``in_round``: theta of the open round was or is being sent to it, so that its update is hoped for.
    ``absent``: it cannot be reached, so nobody waits for it; it may come back while its lease lives.
    Counts are since the start of the open round, in its ``attempt``-th attempt at it.
    """

    ref: PeerRef
    batch_size: int
    multiple: int = 1
    incarnation: str = ""
    loaded: bool = False
    #: its executor, which had the model in an earlier life, was told of this one
    told_at: float | None = None
    in_round: bool = False
    left_out: bool = False
    attempt: int = 0
    absent: bool = False
    missed: int = 0
    started: int = -1
    since: float = 0.0
    started_at: float = 0.0
    reported_at: float = 0.0
    resend_at: float = math.inf
    resend_after_s: float = 0.0
    batches: int = 0
    samples: int = 0
    loss: float = math.nan
    plan: int | None = None
    reached_at: float | None = None
    sent: Contribution | None = None
    accepted: bool = False
    total_samples: int = 0
    refused: int = 0
    batch_time: BatchTime = field(default_factory=BatchTime)
    #: learnt seconds from the last batch to the accepted update, and from the outer step to the start
    sync_s: float | None = None
    theta_s: float | None = None

    @property
    def peer(self) -> str:
        """Its PeerID."""
        return self.ref.peer

    @property
    def fixed(self) -> bool:
        """Its number of batches in the round cannot change any more."""
        return self.accepted or self.sent is not None or self.reached_at is not None

    @property
    def samples_per_s(self) -> float:
        """At its learnt pace, without synchronisation."""
        return self.batch_size / self.batch_time.value_s if self.batch_time.value_s else 0.0

    def state(self, round_: int) -> MemberState:
        """In one word."""
        if self.absent:
            return "unreachable"
        if not self.loaded:
            return "loading"
        if self.left_out:
            return "left-out"
        if not self.in_round or self.started < round_:
            return "waiting"
        if self.accepted:
            return "synchronised"
        if self.fixed:
            return "updating"
        return "training" if self.plan is None else "scheduled"

    def enter(self, now: float, resend_after_s: float) -> None:
        """Theta of the round that is open now is on its way; nothing of it is done."""
        self.in_round = True
        self.left_out = False
        self.since = now
        if math.isinf(self.resend_at):
            # else an earlier theta did not arrive either: short rounds must not put the repetition off
            self.resend_after_s = resend_after_s
            self.resend_at = now + resend_after_s
        self.batches = self.samples = 0
        self.plan = self.reached_at = self.sent = None
        self.accepted = False
        self.batch_time.start_round()

    def start(self, round_: int, now: float) -> None:
        """It runs on theta of ``round_``."""
        if self.started < round_:
            self.theta_s = _smooth(self.theta_s, max(0.0, now - self.since))
        self.started = round_
        self.started_at = self.reported_at = now
        self.resend_at = math.inf
        self.batches = self.samples = 0
        self.reached_at = None
        self.batch_time.start_round()

    def progress(self, report: Progress, now: float) -> bool:
        """Take newer, possible counts; False for old or impossible ones."""
        possible = (
            report.batches > self.batches
            and self.samples <= report.samples <= report.batches * self.batch_size
            and math.isfinite(report.busy_s)
        )
        if not possible:
            return False
        self.batches, self.samples = report.batches, report.samples
        self.loss = report.loss
        self.reported_at = now
        self.batch_time.update(report.batches, report.busy_s)
        if self.plan is not None and self.batches >= self.plan and self.reached_at is None:
            self.reached_at = now
        return True

    def set_plan(self, batches: int, now: float) -> None:
        """It was told to synchronise after ``batches``."""
        self.plan = batches
        if self.batches >= batches and self.reached_at is None and self.batches:
            self.reached_at = now

    def overtake(self, round_: int) -> None:
        """Its update is here, or on its way: it has started, even if that was not heard yet."""
        self.started = max(self.started, round_)
        self.resend_at = math.inf

    def accept(self, now: float) -> None:
        """The parameter server has its update."""
        if not self.accepted and self.reached_at is not None:
            self.sync_s = _smooth(self.sync_s, now - self.reached_at)
        self.accepted = True
        self.missed = self.refused = 0

    def pace(self, now: float, round_: int) -> Pace | None:
        """For the projection; ``None`` while its batch time is unknown."""
        batch_s = self.batch_time.value_s
        if batch_s is None:
            return None
        if self.started < round_:
            since_s = min(0.0, now - self.since - (self.theta_s or 0.0))
            return Pace(self.peer, 0, since_s, batch_s, self.batch_size, self.multiple)
        since_s = min(now - self.reported_at, max(batch_s, _BELIEVED_S))
        return Pace(self.peer, self.batches, since_s, batch_s, self.batch_size, self.multiple)

    def due_at(self, deadline_s: float, round_: int) -> float | None:
        """When waiting for its update ends; ``None`` while its sync point is not known.

        That is ``deadline_s`` after the projected arrival. A first synchronisation, whose duration nobody
        knows yet, gets three times that once the batches are done.
        """
        if self.plan is None:
            return None
        if self.started < round_:
            ready = self.since + 2.0 * (self.theta_s or 0.0)
        elif self.reached_at is not None or self.sent is not None:
            ready = self.reached_at if self.reached_at is not None else self.reported_at
            if self.sync_s is None:
                return ready + 3.0 * deadline_s
        else:
            left = max(0, self.plan - self.batches)
            ready = self.reported_at + left * (self.batch_time.value_s or 0.0)
        return ready + 2.0 * (self.sync_s or 0.0) + deadline_s


def _smooth(mean: float | None, value: float, share: float = 0.3) -> float:
    return value if mean is None else mean + share * (value - mean)
