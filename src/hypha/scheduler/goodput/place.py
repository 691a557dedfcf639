"""The seconds of one worker place: what each went to, and what is not decided yet.

Time is in whole nanoseconds, so that sums are exact. Training is decided by what becomes of its update, and
any time since the last sign of life by whether there is another one; until then both are pending.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

#: what a place may do beside the reasons of badput
TRAINING = "training"
#: applied rounds whose training may still turn out to be lost; no checkpoint leads further back
KEPT_ROUNDS = 500
#: pending stretches of a place before what is certain of them is added up
_MANY = 64


@dataclass
class Effort:
    """Training by whom, for which attempt at a round, and by which executor; while it is under way: ``busy``
    nanoseconds of ``known`` were spent in batches, and in ``unserved`` of them no data node served. ``base``:
    busy before its first report.
    """

    peer: str
    round: int
    attempt: int
    incarnation: str
    unserved_before: int
    #: of its newest report
    batches: int = 0
    base: int | None = None
    busy: int = 0
    known: int = 0
    unserved: int = 0

    @property
    def of(self) -> tuple[str, int, int]:
        return self.peer, self.round, self.attempt

    def is_lost(self, first: int, before_attempt: int | None) -> bool:
        """See :meth:`GoodputPlace.discard`."""
        return self.round >= first and (before_attempt is None or self.attempt < before_attempt)


@dataclass(frozen=True)
class Activity:
    """``what`` a place did from ``start`` to ``end``; ``of`` which training, where it was that."""

    what: str
    start: int
    end: int
    of: Effort | None = None

    def cut(self, at: int) -> list[Activity]:
        """What was before ``at``, and what was after it."""
        if not self.start < at < self.end:
            return [self]
        return [replace(self, end=at), replace(self, start=at)]


@dataclass(eq=False)
class GoodputPlace:
    """Since ``began`` somebody is wanted here; ``peer`` is who is leased for it."""

    began: int
    peer: str = ""
    #: the round machine knows its training executor
    joined: bool = False
    #: nobody trains here any more, and why has been counted
    counted: bool = False
    #: something was lost here, and nobody trains in its place yet
    failed: bool = False
    #: the executor that trained here last; for which worker, round and attempt its batches are done
    trainer: str | None = None
    finished: tuple[str, int, int] | None = None
    what: str = "allocating"
    since: int = 0
    #: the last sign of life: of the executor, and of the worker at least
    heard: int = 0
    alive: int = 0
    effort: Effort | None = None
    pending: list[Activity] = field(default_factory=list)
    #: nanoseconds that are certain, by reason
    badput: Counter[str] = field(default_factory=Counter)
    #: nanoseconds of training in applied rounds that count; and by round, for the newest
    good: int = 0
    goodput: Counter[int] = field(default_factory=Counter)
    leased: int = 0
    leased_since: int | None = None

    def __post_init__(self) -> None:
        self.since = self.heard = self.alive = self.began

    @property
    def last_sign(self) -> int:
        return max(self.heard, self.alive)

    def occupy(self, peer: str, now: int) -> None:
        self.peer, self.leased_since = peer, now
        self.heard = self.alive = now

    def vacate(self, now: int) -> None:
        if self.leased_since is not None:
            self.leased += now - self.leased_since
        self.peer, self.leased_since = "", None
        self.joined = self.counted = False

    def over(self) -> None:
        """Nobody trains here any more, and why has been counted."""
        self.joined, self.counted = False, True
        self.trainer = self.finished = None

    def leased_by(self, now: int) -> int:
        """Nanoseconds in which somebody was leased for it."""
        return self.leased + (0 if self.leased_since is None else now - self.leased_since)

    def turn(self, what: str, at: int) -> None:
        """From ``at`` on (or from when it last turned, where that is later) it does ``what``, a reason of
        badput.
        """
        if what == self.what:
            return
        self._close(at)
        self.what = what

    def train(self, effort: Effort, at: int) -> None:
        self._close(at)
        self.what, self.effort = TRAINING, effort

    def report(self, busy: int, now: int, unserved: int) -> None:
        """The training under way has spent ``busy`` nanoseconds in batches since its round began."""
        effort = self.effort
        if effort is None:
            return
        elapsed = now - self.since
        if effort.base is None:
            # what was trained before its first report, as after a restart of the scheduler, is not in here
            effort.base = max(0, busy - elapsed)
        effort.busy = max(effort.busy, busy - effort.base)
        effort.known = elapsed
        effort.unserved = unserved - effort.unserved_before

    def _close(self, at: int) -> None:
        at = max(at, self.since)
        self.pending += self.under_way(at)
        self.since = at
        self.effort = None
        if len(self.pending) > _MANY:
            self._settle_pending(self.heard)

    def under_way(self, now: int) -> list[Activity]:
        """What was done since it last turned. Of training, what was spent in no batch went to waiting for
        data; to a pause, as far as nobody served any.
        """
        effort, end = self.effort, max(now, self.since)
        if end == self.since:
            return []
        if effort is None:
            return [Activity(self.what, self.since, end)]
        idle = max(0, min(effort.known, end - self.since) - effort.busy)
        paused = max(0, min(idle, effort.unserved))
        at, found = self.since, []
        for what, length in (("paused", paused), ("waiting-for-data", idle - paused)):
            if length:
                found.append(Activity(what, at, at + length))
                at += length
        if end > at:
            found.append(Activity(TRAINING, at, end, effort))
        return found

    def lose(self, sign: int, now: int, keep_training: bool = False) -> None:
        """Who is here failed, and gave the last sign of life at ``sign``: what came after it went to that.
        With ``keep_training`` what failed is the parameter server, and training may count nevertheless.
        """
        self._close(now)
        self.pending = [
            part
            if part.end <= sign or (keep_training and part.of is not None)
            else Activity("failure", part.start, part.end)
            for one in self.pending
            for part in one.cut(sign)
        ]
        self.what, self.failed = "failure", True

    def discard(self, first: int, now: int, before_attempt: int | None = None) -> None:
        """Training for rounds from ``first`` on is for nothing. With ``before_attempt`` only that of the open
        round ``first`` which belongs to an earlier attempt.
        """
        if self.effort is not None and self.effort.is_lost(first, before_attempt):
            self.turn("replayed", now)
        self.pending = [
            Activity("replayed", one.start, one.end)
            if one.of is not None and one.of.is_lost(first, before_attempt)
            else one
            for one in self.pending
        ]
        if before_attempt is None:
            for number in [number for number in self.goodput if number >= first]:
                length = self.goodput.pop(number)
                self.good -= length
                self.badput["replayed"] += length

    def applied(self, round_: int, contributors: Mapping[str, str], now: int) -> None:
        """The round was applied with the updates of ``contributors``, each with its incarnation."""
        if self.effort is not None and self.effort.round <= round_:
            # in it or not: what is trained from now on is no part of that round
            self.turn("waiting-for-theta" if self.peer in contributors else "replayed", now)
        kept: list[Activity] = []
        for one in self.pending:
            if one.of is None or one.of.round > round_:
                kept.append(one)
            elif one.of.round == round_ and contributors.get(one.of.peer) == one.of.incarnation:
                self.goodput[round_] += one.end - one.start
                self.good += one.end - one.start
            else:
                kept.append(Activity("replayed", one.start, one.end))
        self.pending = kept
        for old in [number for number in self.goodput if number <= round_ - KEPT_ROUNDS]:
            del self.goodput[old]

    def settle(self, until: int) -> None:
        """What was no training is certain up to ``until``, which is not in the future."""
        self._settle_pending(until)
        if self.effort is None and self.since < until:
            self.badput[self.what] += until - self.since
            self.since = until

    def _settle_pending(self, until: int) -> None:
        kept: list[Activity] = []
        for part in (part for one in self.pending for part in one.cut(until)):
            if part.of is None and part.end <= until:
                self.badput[part.what] += part.end - part.start
            else:
                kept.append(part)
        self.pending = kept

    def good_before(self, round_: int) -> int:
        """Nanoseconds of training in applied rounds before ``round_``."""
        return self.good - sum(length for number, length in self.goodput.items() if number >= round_)

    def add_to(self, total: Counter[str], now: int) -> None:
        """Add nanoseconds by what they went to, as far as is known now; ``training`` is what is pending,
        ``goodput`` what was applied.
        """
        total.update(self.badput)
        total["goodput"] += self.good
        for one in (*self.pending, *self.under_way(now)):
            total[one.what] += one.end - one.start
