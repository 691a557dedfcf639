"""The training executors of a job, as the round machine knows them, and what each reports of its round."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from hypha.messages import ExecutorError, ExecutorExited, RoundStarted
from hypha.scheduler.goodput.leases import Leases, nanoseconds
from hypha.scheduler.goodput.place import Effort
from hypha.scheduler.goodput.recovery import hung_for_s
from hypha.scheduler.goodput.report import FailureReason
from hypha.scheduler.rounds import events
from hypha.scheduler.rounds.state import OPEN

#: of whose rates the median is what an undisturbed job does
CALM_ROUNDS = 50
#: nobody has been busy in a round for longer
_LONGEST_BUSY_S = 1e9


@dataclass
class TrainingMember:
    """A training executor that the round machine knows, at that place, if there is one for it."""

    place: int | None
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
        """The next round is open."""
        self.batches = self.attempt = 0
        self.plan = None
        self.done = self.accepted = False


class GoodputMembers(Leases):
    """The part of :class:`hypha.scheduler.goodput.machine.Goodput` that knows who trains."""

    def __init__(self, places: int, began: float) -> None:
        super().__init__(places, began)
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

    def _lease_lost(self, lease: str, now: int) -> None:
        number = self._under.get(lease)
        peer = "" if number is None else self.places[number].peer
        super()._lease_lost(lease, now)
        member = self._members.get(peer)
        if member is not None and member.place == number:
            # the round machine does not know it yet, and may receive the worker's report of a round meanwhile
            member.place = None

    def _served(self, served: bool, now: int) -> None:
        if served and self._unserved_since is not None:
            self._unserved += now - self._unserved_since
            self._unserved_since = None
        elif not served and self._unserved_since is None:
            self._unserved_since = now

    def _unserved_by(self, now: int) -> int:
        since = self._unserved_since
        return self._unserved + (0 if since is None else max(0, now - since))

    def _place_of(self, peer: str) -> int | None:
        return next((number for number, place in enumerate(self.places) if place.peer == peer), None)

    def _joined(self, peer: str) -> None:
        number = self._place_of(peer)
        self._members.setdefault(peer, TrainingMember(number))
        self._counted_early.discard(peer)
        if number is not None:
            self._counted.discard(self.places[number].lease)
            self._touched.add(number)

    def _gone(self, peer: str, reason: FailureReason, sign: int | None, now: int) -> None:
        """It takes part no more; ``sign`` is its last sign of life, where that is known better than here."""
        member = self._members.pop(peer, None)
        if member is None:
            return
        if member.incarnation:
            self._past.add(member.incarnation)
        self._touched.update(range(len(self.places)))
        number = member.place
        early = peer in self._counted_early
        self._counted_early.discard(peer)
        if early or number is None or self.places[number].peer != peer:
            return
        place = self.places[number]
        self.fail(number, reason, max(place.heard, place.alive) if sign is None else sign, now)

    def _left(self, peer: str, now: int) -> None:
        """It was let go, as its worker ends: that is no failure."""
        member = self._members.pop(peer, None)
        if member is None:
            return
        if member.incarnation:
            self._past.add(member.incarnation)
        self._touched.update(range(len(self.places)))
        number = member.place
        if number is not None and self.places[number].peer == peer:
            place = self.places[number]
            self._counted.add(place.lease)
            self._trainer.pop(number, None)
            self._finished.pop(number, None)
            if place.effort is not None:
                place.turn("waiting-for-theta", now)

    def _spare_used(self, number: int, now: int) -> None:
        """Who was leased before its place was free has that now, and may train there already."""
        peer = self.places[number].peer
        member = self._members.get(peer)
        if member is None:
            return
        member.place = number
        if member.started == self._round and not member.done and self._phase in (*OPEN, "closing"):
            self._trainer[number] = member.incarnation
            effort = Effort(peer, member.started, member.attempt, member.incarnation, self._unserved_by(now))
            self._back(number, now)
            self.places[number].train(effort, now)

    def _heard(self, member: TrainingMember, incarnation: str, now: int) -> None:
        """Its executor runs. Where another one trained last, that one is over, and nobody has reported it."""
        if member.place is None:
            return
        place = self.places[member.place]
        before = self._trainer.get(member.place)
        if before is not None and before != incarnation:
            self.fail(member.place, "executor", place.heard, now)
            self._counted.discard(place.lease)
        place.heard = max(place.heard, now)
        self._touched.add(member.place)

    def _executor_failed(
        self, peer: str, member: TrainingMember, event: ExecutorError | ExecutorExited, now: int
    ) -> None:
        place = self.places[member.place] if member.place is not None else None
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
        number = member.place
        member.started, member.attempt = event.round, event.attempt
        member.batches, member.done = 0, False
        if number is None:
            return
        place, now = self.places[number], (peer, event.round, event.attempt)
        self._trainer[number] = member.incarnation
        effort = place.effort
        if self._finished.get(number) == now:
            # reported again after another generation of the job began
            member.done = True
            self._back(number, at)
        elif effort is None or (effort.peer, effort.round, effort.attempt) != now:
            if event.attempt:
                place.discard(event.round, at, before_attempt=event.attempt)
            self._back(number, at)
            place.train(Effort(*now, member.incarnation, self._unserved_by(at)), at)
        self._touched.add(number)

    def _back(self, number: int, at: int) -> None:
        """What failed there, or the job's generation that it waited for, goes on."""
        place = self.places[number]
        if place.failed:
            place.failed = False
            self._news += self.recoveries.replaced(number, at)
        self._stalled.discard(number)

    def _reported(self, event: events.Reported, now: int) -> None:
        generation, report, member = self._generation, event.progress, self._members.get(event.sender)
        if generation is None or member is None or event.incarnation != member.incarnation:
            return
        if (event.stamp.job_id, event.stamp.generation) != (
            generation.start.job_id,
            generation.start.generation,
        ):
            return
        number = member.place
        if number is not None:
            self.places[number].heard = now
        fits = (report.round, report.attempt) == (self._round, member.attempt)
        open_ = fits and member.started == self._round and not member.done
        if not open_ or report.batches <= member.batches or not math.isfinite(report.busy_s):
            return
        member.batches = report.batches
        if number is not None:
            busy = nanoseconds(max(0.0, min(report.busy_s, _LONGEST_BUSY_S)))
            self.places[number].report(busy, now, self._unserved_by(now))
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
        number = member.place
        if number is not None and self.places[number].effort is not None:
            self.places[number].turn("waiting-for-theta", now)
            self._finished[number] = (peer, self._round, member.attempt)
            self._touched.add(number)
