"""A worker as the round machine sees it: what it said, what it was told, how fast it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from hypha.messages import PeerRef, Progress
from hypha.rules.contributions import is_count
from hypha.scheduler.rounds.claims import bounded_loss
from hypha.scheduler.rounds.projection import BatchTime, ProjectedWorker

#: longest time that a silent worker is believed to go on at its pace, if its batches are shorter
_BELIEVED_S = 1.0
#: a plan may reach a worker so much later than it was made; meanwhile it trains on
_OVERSHOOT_S = 1.0
#: a round may begin at a worker so much earlier than here, as the scheduler may stand still
_EARLY_S = 30.0
#: a worker that ends hands its update over so long before, at least
_LEAST_RESERVE_S = 1.0
#: batches that a worker may take before anything of them is known here
_UNKNOWN_BATCHES = 16

MemberState = Literal[
    "loading",
    "waiting",
    "training",
    "scheduled",
    "updating",
    "synchronised",
    "left-out",
    "unreachable",
    "leaving",
]


@dataclass(frozen=True)
class Leave:
    """That somebody ends ``at``, which was heard at ``since``."""

    at: float
    since: float

    def reserve_s(self, sync_s: float | None) -> float:
        """What is kept of the time for a synchronisation; half of it while its length is not known."""
        if sync_s is None:
            return max(_LEAST_RESERVE_S, (self.at - self.since) / 2.0)
        return max(_LEAST_RESERVE_S, 3.0 * sync_s)


@dataclass
class Member:
    """``in_round``: theta of the open round was or is being sent to it, so that its update is hoped for.
    ``absent``: it cannot be reached, so nobody waits for it; it may come back while its lease lives.
    Counts are since the start of the open round, in its ``attempt``-th attempt at it.
    """

    ref: PeerRef
    batch_size: int
    multiple: int = 1
    joined_at: float = 0.0
    incarnation: str = ""
    loaded: bool = False
    #: its executor, which had the model in an earlier generation, was told of this one
    told_at: float | None = None
    in_round: bool = False
    left_out: bool = False
    attempt: int = 0
    absent: bool = False
    missed: int = 0
    #: the open round is closed without its update, which should have been here long ago
    overdue: bool = False
    #: in so many rounds in a row that it began
    stalled: int = 0
    #: what it said of itself that cannot be, in its present process
    impossible: int = 0
    #: questions for slices that it was refused lately, as it holds enough; and whether that was logged
    hoarding: int = 0
    named: bool = False
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
    #: when it ends, and since when that is known; how many batches of the open round it can do until then
    leaves: Leave | None = None
    last: int | None = None
    #: its plan is as short as it is because it leaves
    early: bool = False
    #: the largest plan of the round ``most_in``, and when its update of that is to be here
    most: int = 0
    most_in: int = -1
    due_by: float = math.inf
    reached_at: float | None = None
    accepted: bool = False
    total_samples: int = 0
    refused: int = 0
    batch_time: BatchTime = field(default_factory=BatchTime)
    #: how long it took to load the model
    load_s: float | None = None
    #: learnt seconds from the last batch to the accepted update, and from the outer step to the start
    sync_s: float | None = None
    theta_s: float | None = None
    #: smoothed share of its rounds from its last batch to the first of the next round
    idle_share: float | None = None
    #: since when it has waited for the open round; None where that is not known
    waits_since: float | None = None

    @property
    def peer(self) -> str:
        """Its PeerID."""
        return self.ref.peer

    @property
    def fixed(self) -> bool:
        """Its number of batches in the round cannot change any more."""
        return self.accepted or self.reached_at is not None

    @property
    def samples_per_s(self) -> float:
        """At its learnt pace, without synchronisation."""
        return self.batch_size / self.batch_time.value_s if self.batch_time.value_s else 0.0

    def can_begin(self, now: float) -> bool:
        """There is time for an update of another round before it leaves, as far as is known."""
        if self.leaves is None:
            return True
        needs_s = (self.theta_s or 0.0) + self.multiple * (self.batch_time.value_s or 0.0)
        return now + needs_s + self.leaves.reserve_s(self.sync_s) < self.leaves.at

    def foresee(self, now: float, round_: int, ends: Leave | None = None) -> None:
        """Count anew how many batches of the open round it can do before it leaves, if it does, or the round
        ``ends``: what it has done by then is to be with the parameter server.
        """
        self.last = None
        until = [one.at - one.reserve_s(self.sync_s) for one in (self.leaves, ends) if one is not None]
        if not until:
            return
        left_s = min(until) - now
        pace = self.pace(now, round_)
        if pace is not None:
            # half a batch more, as one may take longer than it did
            self.last = max(self.multiple, pace.batches_at(max(0.0, left_s - 0.5 * pace.batch_s)))
        elif left_s <= 0:
            self.last = max(self.multiple, self.batches)

    def state(self, round_: int) -> MemberState:
        """In one word."""
        if self.absent:
            return "unreachable"
        if self.leaves is not None:
            return "leaving"
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
        self.waits_since = self.reached_at
        self.plan = self.last = self.reached_at = None
        self.early = False
        self.due_by = math.inf
        self.accepted = False
        self.batch_time.start_round()

    def start(self, round_: int, now: float) -> None:
        """It runs on theta of ``round_``."""
        if self.started < round_:
            self.theta_s = _smooth(self.theta_s, max(0.0, now - self.since))
            if self.waits_since is not None and self.started == round_ - 1 and now > self.started_at:
                waited_s = max(0.0, now - max(self.waits_since, self.started_at))
                self.idle_share = _smooth(self.idle_share, waited_s / (now - self.started_at))
        self.waits_since = None
        self.started = round_
        self.started_at = self.reported_at = now
        self.resend_at = math.inf
        self.batches = self.samples = 0
        self.reached_at = None
        self.batch_time.start_round()

    def resize(self, batch_size: int) -> None:
        """Its batches have so many samples from now on. Until one was measured they are thought to take as
        much longer.
        """
        self.batch_time.scale(batch_size / self.batch_size)
        self.batch_size = batch_size

    def progress(
        self, report: Progress, now: float, rows: int | None = None, open_before: bool = False
    ) -> bool | None:
        """Take newer, possible counts; False for old ones, None for such as cannot be. ``rows`` are those of
        the slices that are assigned to it, if that is known: it cannot have trained on more; nor for longer
        than the round lasts, unless an earlier generation has begun that.
        """
        possible = (
            is_count(report.batches)
            and report.samples <= report.batches * self.batch_size
            and (rows is None or report.samples <= rows)
            and math.isfinite(report.busy_s)
        )
        if not possible:
            return None
        if report.batches <= self.batches or report.samples < self.samples:
            return False
        self.batches, self.samples = report.batches, report.samples
        self.loss = bounded_loss(report.loss, math.nan)
        self.reported_at = now
        longest_s = math.inf if open_before else now - self.since + _EARLY_S
        self.batch_time.update(report.batches, min(report.busy_s, longest_s))
        if math.isinf(self.due_by):
            # its pace is known now
            self.expect(now)
        if self.plan is not None and self.batches >= self.plan and self.reached_at is None:
            self.reached_at = now
        return True

    def set_plan(self, batches: int, now: float, round_: int) -> None:
        """It was told to synchronise after ``batches`` of ``round_``."""
        self.plan = batches
        self.early = self.leaves is not None and self.last is not None and batches >= self.last
        self.expect(now)
        self.most = max(batches, self.most if self.most_in == round_ else 0)
        self.most_in = round_
        if self.batches >= batches and self.reached_at is None and self.batches:
            self.reached_at = now

    def expect(self, now: float) -> None:
        """Count anew until when its batches are to be done. One that is slower than it was has twice the time
        that it is thought to need; reports alone put nothing off.
        """
        batch_s = self.batch_time.value_s
        if self.plan is None or batch_s is None:
            self.due_by = math.inf
            return
        self.due_by = now + 2.0 * max(0, self.plan - self.batches) * batch_s

    def overtake(self, round_: int) -> None:
        """Its update is here: it has started, even if that was not reported yet."""
        self.started = max(self.started, round_)
        self.resend_at = math.inf

    def accept(self, now: float) -> None:
        """The parameter server has its update."""
        if not self.accepted and self.reached_at is not None:
            self.sync_s = _smooth(self.sync_s, now - self.reached_at)
        self.accepted = True
        # an earlier one of the same round may have been refused
        self.left_out = False
        self.missed = self.refused = self.stalled = 0
        self.hoarding //= 2

    def most_samples(self, round_: int, may_hold: int) -> int | None:
        """For how many samples its update of ``round_`` may stand at most: its largest plan, and what it may
        do before it receives that, of the rows that it ``may_hold``; None where it was sent none, so that
        there can be no update yet.
        """
        if self.most_in != round_:
            return None
        batch_s = self.batch_time.value_s
        late = math.ceil(_OVERSHOOT_S / batch_s) if batch_s else _UNKNOWN_BATCHES
        batches = max(self.most, self.batches) + max(2 * self.multiple, late)
        return min(may_hold, batches * self.batch_size)

    def may_hold(self, ahead: int, target: int, rows_a_slice: int, whole: bool = False) -> int:
        """Rows of slices that are of use to it: those of its batches so far, twice over as its reports are
        late, or of its plan, but not more than the ``target`` of a ``whole`` round; and ``ahead`` slices that
        are fetched before they are needed, with one that it reads and one that it begins next.
        """
        batches = max(self.plan or 0, 2 * self.batches, _UNKNOWN_BATCHES) + _UNKNOWN_BATCHES
        most = max(target, (self.plan or 0) * self.batch_size)
        return (most if whole else min(batches * self.batch_size, most)) + (ahead + 2) * rows_a_slice

    def pace(self, now: float, round_: int) -> ProjectedWorker | None:
        """For the projection; ``None`` while its batch time is unknown."""
        batch_s = self.batch_time.value_s
        if batch_s is None:
            return None
        if self.started < round_:
            since_s = min(0.0, now - self.since - (self.theta_s or 0.0))
            return ProjectedWorker(self.peer, 0, since_s, batch_s, self.batch_size, self.multiple, self.last)
        since_s = min(now - self.reported_at, max(batch_s, _BELIEVED_S))
        return ProjectedWorker(
            self.peer, self.batches, since_s, batch_s, self.batch_size, self.multiple, self.last
        )

    def due_at(self, deadline_s: float, round_: int) -> float | None:
        """When waiting for its update ends; ``None`` while its sync point is not known.

        That is ``deadline_s`` after the projected arrival. A first synchronisation, whose duration nobody
        knows yet, gets three times that once the batches are done.
        """
        if self.plan is None:
            return None
        if self.started < round_:
            ready = self.since + 2.0 * (self.theta_s or 0.0)
        elif self.reached_at is not None:
            ready = self.reached_at
            if self.sync_s is None:
                return ready + 3.0 * deadline_s
        else:
            left = max(0, self.plan - self.batches)
            ready = min(self.reported_at + left * (self.batch_time.value_s or 0.0), self.due_by)
        return ready + 2.0 * (self.sync_s or 0.0) + deadline_s


def _smooth(mean: float | None, value: float, share: float = 0.3) -> float:
    return value if mean is None else mean + share * (value - mean)
