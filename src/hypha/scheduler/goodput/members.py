"""The places of a job, who is leased for each, and what its training executors report of their rounds.

Leases are followed as the allocator and the renewals note them, executors as the round machine does.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from hypha.journal import JournalEntry
from hypha.messages import ExecutorClass, ExecutorError, ExecutorExited, JobStamp, RoundStarted
from hypha.scheduler.goodput.place import Effort, GoodputPlace
from hypha.scheduler.goodput.report import FailureReason, GoodputNews, Recoveries, hung_for_s, reason_of
from hypha.scheduler.leasing import events as allocation
from hypha.scheduler.leasing.renewal import Lapsed, Renewed
from hypha.scheduler.rounds import events
from hypha.scheduler.rounds.state import OPEN

NANOSECONDS = 1_000_000_000
#: of whose rates the median is what an undisturbed job does
CALM_ROUNDS = 50
#: nobody has been busy in a round for longer
_LONGEST_BUSY_S = 1e9


def nanoseconds(seconds: float) -> int:
    return round(seconds * NANOSECONDS)


@dataclass
class TrainingMember:
    """A training executor that the round machine knows, at that place, if there is one for it."""

    place: GoodputPlace | None
    incarnation: str = ""
    loaded: bool = False
    absent: bool = False
    started: int = -1
    attempt: int = 0
    batches: int = 0
    plan: int | None = None
    #: all batches of the open round are done; and the parameter server has the update
    done: bool = False
    accepted: bool = False

    def open_round(self) -> None:
        self.batches = self.attempt = 0
        self.plan = None
        self.done = self.accepted = False


class GoodputMembers:
    """The part of :class:`hypha.scheduler.goodput.machine.Goodput` that knows who has a place and trains."""

    def __init__(self, places: int, began: float) -> None:
        self.began = self.now = nanoseconds(began)
        #: the job gave everything back; time does not count any more
        self.ended = False
        self.places = [GoodputPlace(self.began) for _ in range(places)]
        self.recoveries = Recoveries(self.began)
        self._news: list[GoodputNews] = []
        #: places about which something changed
        self._touched: set[GoodputPlace] = set()
        #: by lease: what was offered, where it is used, why it ended
        self._offered: dict[str, tuple[ExecutorClass, str]] = {}
        self._under: dict[str, GoodputPlace] = {}
        #: leases for which there is no place yet, in the order in which they were gained
        self._spare: dict[str, str] = {}
        self._lapsed: dict[str, str] = {}
        #: places that an earlier scheduler had leased
        self._adopted: set[GoodputPlace] = set()
        self._server_lease: str | None = None
        self._server_sign = self.began
        #: leases under which something failed, that was counted; and workers whose loss the round machine has
        #: not noted yet
        self._counted: set[str] = set()
        self._counted_early: set[str] = set()
        #: something was missing in the open round
        self._disturbed = True
        self._generation: events.GenerationBegan | None = None
        self._over = False
        self._phase = "loading"
        self._round = 0
        #: how many members the machine has by its own count; None while it takes no more notice of them
        self._known: int | None = None
        self._members: dict[str, TrainingMember] = {}
        #: executors that are over
        self._past: set[str] = set()
        #: reports of a round that is not open yet, and when they came
        self._early: list[tuple[events.Told, int]] = []
        self._server = ""
        self._server_down = False
        self._unserved = 0
        self._unserved_since: int | None = None
        #: samples of the rounds that count; those from ``_first`` on were applied here
        self._samples: dict[int, int] = {}
        self._first = 0
        self._total = self._here = 0
        #: the newest durable checkpoint
        self._checkpoint = 0
        #: samples a second of rounds to which every place contributed and in which nothing failed
        self._calm: deque[float] = deque(maxlen=CALM_ROUNDS)
        self._mood: tuple[object, ...] = ()

    def _take_renewal(self, entry: JournalEntry, lease: str, now: int) -> None:
        if isinstance(entry.event, Renewed):
            place = self._under.get(lease)
            if place is not None:
                place.alive = now
            elif lease == self._server_lease:
                self._server_sign = now
        for action in entry.actions:
            if isinstance(action, Lapsed):
                self._lapsed[lease] = action.reason

    def _take_allocation(self, entry: JournalEntry, now: int) -> None:
        for action in entry.actions:
            if isinstance(action, allocation.Accept):
                self._offered[action.offer.lease_id] = (action.kind, action.offer.worker.peer)
        match entry.event:
            case allocation.Gained(lease_id=lease) if lease in self._offered:
                self._gained(*self._offered.pop(lease), lease, now)
            case allocation.Adopted(kind=kind, lease_id=lease, worker=peer):
                place = self._gained(kind, peer, lease, now)
                if place is not None:
                    self._adopted.add(place)
            case allocation.LeaseFailed(lease_id=lease):
                self._lease_lost(lease, now)
            case allocation.Want(kind="train", count=0):
                # the job gives everything back
                self.ended = True

    def _gained(self, kind: ExecutorClass, peer: str, lease: str, now: int) -> GoodputPlace | None:
        """The place that ``peer`` has now, for a worker; one where something was lost comes first."""
        if kind == "aggregate":
            self._server_lease, self._server_sign = lease, now
            return None
        vacant = [place for place in self.places if not place.peer]
        if any(place.peer == peer for place in self.places):
            return None
        if not vacant:
            # it is to take the place of a worker that leaves, which has that still
            self._spare[lease] = peer
            return None
        place = min(vacant, key=lambda one: not one.failed)
        place.occupy(peer, lease, now)
        self._under[lease] = place
        self._touched.add(place)
        return place

    def _lease_lost(self, lease: str, now: int) -> None:
        self._offered.pop(lease, None)
        self._spare.pop(lease, None)
        why = self._lapsed.pop(lease, None)
        if lease == self._server_lease:
            self._server_lease = None
        place = self._under.pop(lease, None)
        if place is None:
            return
        peer, member = place.peer, self._members.get(place.peer)
        if self._generation is not None and lease not in self._counted:
            reason: FailureReason = "dropped" if why is None else reason_of(why)
            self._fail(place, reason, place.last_sign, now)
            self._counted_early.add(peer)
        self._counted.discard(lease)
        self._adopted.discard(place)
        place.vacate(now)
        self._touched.add(place)
        if self._spare:
            lease, peer = next(iter(self._spare.items()))
            del self._spare[lease]
            place.occupy(peer, lease, now)
            self._under[lease] = place
            self._spare_used(place, now)
        if member is not None and member.place is place:
            # the round machine does not know it yet, and may receive the worker's report of a round meanwhile
            member.place = None

    def _fail(self, place: GoodputPlace, reason: FailureReason, sign: int, now: int) -> None:
        """What is at the place is lost; its last sign of life was at ``sign``."""
        place.lose(sign, now)
        self._over_at(place)
        place.stalled = False
        self._disturbed = True
        self._news += self.recoveries.failed(place, place.peer, reason, sign, now)

    def _over_at(self, place: GoodputPlace) -> None:
        """Nobody trains at the place any more, and why has been counted."""
        self._counted.add(place.lease)
        place.trainer = place.finished = None

    def _touch_all(self) -> None:
        self._touched.update(self.places)

    def _is_current(self, stamp: JobStamp) -> bool:
        if self._generation is None:
            return False
        start = self._generation.start
        return (stamp.job_id, stamp.generation) == (start.job_id, start.generation)

    def _served(self, served: bool, now: int) -> None:
        if served and self._unserved_since is not None:
            self._unserved += now - self._unserved_since
            self._unserved_since = None
        elif not served and self._unserved_since is None:
            self._unserved_since = now

    def _unserved_by(self, now: int) -> int:
        since = self._unserved_since
        return self._unserved + (0 if since is None else max(0, now - since))

    def _joined(self, peer: str) -> None:
        place = next((one for one in self.places if one.peer == peer), None)
        self._members.setdefault(peer, TrainingMember(place))
        self._counted_early.discard(peer)
        if place is not None:
            self._counted.discard(place.lease)
            self._touched.add(place)

    def _leave(self, peer: str) -> TrainingMember | None:
        member = self._members.pop(peer, None)
        if member is not None:
            if member.incarnation:
                self._past.add(member.incarnation)
            self._touch_all()
        return member

    def _gone(self, peer: str, reason: FailureReason, sign: int | None, now: int) -> None:
        """It takes part no more; ``sign`` is its last sign of life, where that is known better than here."""
        member = self._leave(peer)
        if member is None:
            return
        place = member.place
        early = peer in self._counted_early
        self._counted_early.discard(peer)
        if not early and place is not None and place.peer == peer:
            self._fail(place, reason, place.last_sign if sign is None else sign, now)

    def _left(self, peer: str, now: int) -> None:
        """It was let go, as its worker ends: that is no failure."""
        member = self._leave(peer)
        place = None if member is None else member.place
        if place is not None and place.peer == peer:
            self._over_at(place)
            if place.effort is not None:
                place.turn("waiting-for-theta", now)

    def _spare_used(self, place: GoodputPlace, now: int) -> None:
        """Who was leased before its place was free has that now, and may train there already."""
        peer, member = place.peer, self._members.get(place.peer)
        if member is None:
            return
        member.place = place
        if member.started == self._round and not member.done and self._phase in (*OPEN, "closing"):
            place.trainer = member.incarnation
            effort = Effort(peer, member.started, member.attempt, member.incarnation, self._unserved_by(now))
            self._back(place, now)
            place.train(effort, now)

    def _heard(self, member: TrainingMember, incarnation: str, now: int) -> None:
        """Its executor runs. Where another one trained last, that one is over, and nobody has reported it."""
        place = member.place
        if place is None:
            return
        if place.trainer is not None and place.trainer != incarnation:
            self._fail(place, "executor", place.heard, now)
            self._counted.discard(place.lease)
        place.heard = max(place.heard, now)
        self._touched.add(place)

    def _executor_failed(
        self, peer: str, member: TrainingMember, event: ExecutorError | ExecutorExited, now: int
    ) -> None:
        place = member.place
        text = event.tail if isinstance(event, ExecutorExited) else event.message
        silent_s = hung_for_s(text)
        if silent_s is not None:
            self._gone(peer, "hang", max(self.began, now - nanoseconds(silent_s)), now)
            return
        # one that waits has nothing to report
        training = place is not None and place.effort is not None
        self._gone(peer, "executor", place.heard if place is not None and training else now, now)

    def _started(self, peer: str, member: TrainingMember, event: RoundStarted, at: int) -> None:
        known = event.round == self._round and self._phase in (*OPEN, "closing")
        if not known or member.accepted or event.attempt < member.attempt:
            return
        again = member.started == event.round and event.attempt == member.attempt
        if again and (member.done or member.batches):
            return
        place = member.place
        member.started, member.attempt = event.round, event.attempt
        member.batches, member.done = 0, False
        if place is None:
            return
        now, effort = (peer, event.round, event.attempt), place.effort
        place.trainer = member.incarnation
        if place.finished == now:
            # reported again after another generation of the job began
            member.done = True
            self._back(place, at)
        elif effort is None or (effort.peer, effort.round, effort.attempt) != now:
            if event.attempt:
                place.discard(event.round, at, before_attempt=event.attempt)
            self._back(place, at)
            place.train(Effort(*now, member.incarnation, self._unserved_by(at)), at)
        self._touched.add(place)

    def _back(self, place: GoodputPlace, at: int) -> None:
        """What failed there, or the job's generation that it waited for, goes on."""
        if place.failed:
            place.failed = False
            self._news += self.recoveries.replaced(place, at)
        place.stalled = False

    def _reported(self, event: events.Reported, now: int) -> None:
        report, member = event.progress, self._members.get(event.sender)
        if member is None or event.incarnation != member.incarnation or not self._is_current(event.stamp):
            return
        place = member.place
        if place is not None:
            place.heard = now
        fits = (report.round, report.attempt) == (self._round, member.attempt)
        open_ = fits and member.started == self._round and not member.done
        if not open_ or report.batches <= member.batches or not math.isfinite(report.busy_s):
            return
        member.batches = report.batches
        if place is not None:
            busy = nanoseconds(max(0.0, min(report.busy_s, _LONGEST_BUSY_S)))
            place.report(busy, now, self._unserved_by(now))
        if member.plan is not None and member.batches >= member.plan:
            self._done(event.sender, member, now)

    def _planned(self, peer: str, round_: int, batches: int | None, now: int) -> None:
        member = self._members.get(peer)
        if member is None or round_ != self._round:
            return
        member.plan = batches
        if batches is not None and member.batches > 0 and member.batches >= batches and not member.done:
            self._done(peer, member, now)

    def _done(self, peer: str, member: TrainingMember, now: int) -> None:
        """All its batches of the open round are done."""
        member.done = True
        place = member.place
        if place is not None and place.effort is not None:
            place.turn("waiting-for-theta", now)
            place.finished = (peer, self._round, member.attempt)
            self._touched.add(place)
