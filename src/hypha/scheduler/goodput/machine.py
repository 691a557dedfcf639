"""What the time of a job's worker places goes to: goodput, and badput by reason. A pure machine.

It is fed with the journal of the round machine, the allocator and the renewals, and reads what the round
machine knows of its members after each entry; they do not know of it. For every worker that the job wants
there is a place, whose every nanosecond since the scheduler began is in exactly one of:

- goodput: batches, where their update is in an applied round that counts;
- ``allocating``: nobody is leased for the place, or no parameter server;
- ``loading``: leased, and the model not there yet, or not that of others whom the start waits for;
- ``waiting-for-data``: time of a round that was spent in no batch;
- ``waiting-for-theta``: from the last batch until the parameter server has the update, and from closing the
  round until training begins again; at the end, while the model is exported;
- ``waiting-for-stragglers``: the update is with the parameter server, and the round is not closed;
- ``failure``: from the last sign of life of what was lost here until somebody trains here again; after the
  loss of a parameter server, or a scheduler, for those who can do nothing without it;
- ``replayed``: batches of rounds that were discarded, of attempts that were refused, of updates left out or
  never sent;
- ``paused``: the update is there, and the round kept open for lack of workers; or nobody served data.

A round's batches are pending until it is applied. If the job goes back to an older checkpoint, what was
goodput becomes ``replayed``. :meth:`Goodput.certain` is what cannot change any more, for counters.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping
from statistics import median

from hypha.journal import JournalEntry
from hypha.messages import ExecutorError, ExecutorExited, LedgerRound, RoundStarted
from hypha.scheduler.goodput.leases import NANOSECONDS, GoodputLeases, nanoseconds
from hypha.scheduler.goodput.place import TRAINING, Effort, GoodputPlace
from hypha.scheduler.goodput.report import FailureReason, GoodputReport, Recovery, hung_for_s, reason_of
from hypha.scheduler.leasing.allocator import NAME as ALLOCATOR
from hypha.scheduler.leasing.renewal import NAME as RENEWAL
from hypha.scheduler.rounds import events
from hypha.scheduler.rounds.machine import NAME as ROUNDS
from hypha.scheduler.rounds.participants import Member
from hypha.scheduler.rounds.state import OPEN, RoundState
from hypha.scheduler.status.snapshot import Progressed
from hypha.telemetry.instruments import BADPUT_REASONS

#: of whose rates the median is what an undisturbed job does
CALM_ROUNDS = 50
#: nobody has been busy in a round for longer
_LONGEST_BUSY_S = 1e9


class Goodput(GoodputLeases):
    """Of a job that wants ``places`` workers, whose scheduler began at ``began`` (seconds of the clock that
    the journal's entries have). ``machine`` gives the present round machine, None before there is one;
    ``progressed`` has the rounds that count.
    """

    def __init__(
        self, places: int, began: float, machine: Callable[[], RoundState | None], progressed: Progressed
    ) -> None:
        super().__init__(places, began, machine)
        self._progressed = progressed
        #: the generation's parameter server is lost
        self._over = False
        self._phase = "loading"
        self._round = 0
        #: who began a round that is not open yet: which one, and when that was reported
        self._early: dict[str, tuple[int, int]] = {}
        self._server = ""
        self._server_down = False
        self._unserved = 0
        self._unserved_since: int | None = None
        #: rounds that count from this one on were applied by this scheduler; None before it has begun
        self._first: int | None = None
        #: the newest durable checkpoint
        self._checkpoint = 0
        #: samples a second of rounds to which every place contributed and in which nothing failed
        self._calm: deque[float] = deque(maxlen=CALM_ROUNDS)

    def report(self, now: float) -> GoodputReport:
        """As far as is known at ``now``; after the job's end, as it was then."""
        at = self._at(now)
        total: Counter[str] = Counter()
        for place in self.places:
            place.add_to(total, at)
        wall_s = (at - self.began) / NANOSECONDS
        here = 0 if self._first is None else self._progressed.samples_from(self._first)
        rate = here / wall_s if wall_s > 0 else 0.0
        calm = median(self._calm) if self._calm else None
        wanted = len(self.places) * (at - self.began)
        return GoodputReport(
            wall_s=wall_s,
            places=len(self.places),
            goodput_s=(total["goodput"] + total[TRAINING]) / NANOSECONDS,
            pending_s=total[TRAINING] / NANOSECONDS,
            badput_s={reason: total[reason] / NANOSECONDS for reason in BADPUT_REASONS},
            samples=self._progressed.samples,
            samples_per_s=rate,
            calm_samples_per_s=calm,
            runtime=rate / calm if calm else None,
            scheduling=sum(place.leased_by(at) for place in self.places) / wanted if wanted else 0.0,
            recoveries=self.recoveries.told,
        )

    def certain(self, now: float) -> tuple[float, dict[str, float]]:
        """Seconds of goodput, and of badput by reason, that cannot change any more: training of rounds before
        the newest durable checkpoint, and what was no training up to the last sign of life.
        """
        at = self.now = self._at(now)
        badput: Counter[str] = Counter()
        for place in self.places:
            live = place.peer and not place.failed and not self.ended
            place.settle(min(at, place.last_sign) if live else at)
            badput.update(place.badput)
        good = sum(place.good_before(self._checkpoint) for place in self.places)
        return good / NANOSECONDS, {reason: badput[reason] / NANOSECONDS for reason in BADPUT_REASONS}

    def validate(self) -> None:
        """Assert what always holds after an entry. For tests and simulation."""
        for number, place in enumerate(self.places):
            split: Counter[str] = Counter()
            place.add_to(split, self.now)
            lasted = self.now - self.began
            assert sum(split.values()) == lasted, f"place {number}: {split} do not make {lasted}"
            assert min(split.values(), default=0) >= 0, f"place {number}: {split}"
            strange = split.keys() - {*BADPUT_REASONS, TRAINING, "goodput"}
            assert not strange, f"place {number}: {strange} are no reasons"
            assert place.peer or place.effort is None, f"place {number}: nobody trains there"
            assert (place.effort is None) == (place.what != TRAINING), f"place {number} is {place.what}"
            assert place.good >= sum(place.goodput.values()), f"place {number}: {place.goodput}"
            assert place.since <= self.now, f"place {number} turned in the future"
        leased = [place.peer for place in self.places if place.peer]
        assert len(leased) == len(set(leased)), f"a worker has two places: {leased}"

    def _at(self, now: float) -> int:
        return self.now if self.ended else max(self.now, nanoseconds(now))

    def handle(self, entry: JournalEntry) -> list[Recovery]:
        """The failures that were noticed, or got over a step further."""
        if self.ended:
            return []
        # a machine's first entry is made before it gets the time
        now = self.now = max(self.now, nanoseconds(entry.at_s))
        if isinstance(entry.event, events.SliceAsked):
            # there are many, and they move nothing but slices
            return []
        if entry.machine == ROUNDS:
            self._take_round(entry, now)
        elif entry.machine == ALLOCATOR:
            self._take_allocation(entry, now)
        elif entry.machine.startswith(f"{RENEWAL}:"):
            self._take_renewal(entry, entry.machine[len(RENEWAL) + 1 :], now)
        self._look(now)
        changed, self.recoveries.changed = self.recoveries.changed, []
        return changed

    def _take_round(self, entry: JournalEntry, now: int) -> None:
        event, reached = entry.event, self._round
        if isinstance(entry.state, Mapping):
            self._phase, self._round = str(entry.state["phase"]), int(str(entry.state["round"]))
        if isinstance(event, events.GenerationBegan):
            self._begin_generation(event, reached, now)
            return
        self._take_event(event, now)
        members = self._members
        for place in self.places:
            if place.joined and place.peer not in members:
                self._gone(place, entry, now)
        for action in entry.actions:
            match action:
                case events.Record(entry=record):
                    self._recorded(record, now)
                case events.Checkpointed(round=round_):
                    self._checkpoint = max(self._checkpoint, round_)
                case events.Publish():
                    self._checkpoint = self._round
                case events.Restart(reason=reason):
                    self._server_lost(event, reason, now)
        if self._server_down and self._phase != "loading" and not self._over:
            self._server_down = False
            self.recoveries.replaced(None, now)

    def _take_event(self, event: object, now: int) -> None:
        match event:
            case events.Joined(ref=ref, kind="train"):
                if (place := self._place_of(ref.peer)) is not None:
                    place.joined = ref.peer in self._members
                    place.counted = False
            case events.Joined(ref=ref):
                self._server, self._server_sign = ref.peer, now
            case events.Unreachable(kind="train"):
                self._disturbed = True
            case events.DataServed(served=served):
                self._unserved = self._unserved_by(now)
                self._unserved_since = None if served else now
            case events.Told(sender=sender, kind="aggregate") if sender == self._server:
                self._server_sign = now
            case events.Told(sender=sender, kind="train", incarnation=incarnation):
                if (place := self._running(sender, incarnation)) is not None:
                    self._heard(place, incarnation, now)
                if isinstance(event.event, RoundStarted) and (
                    event.event.round > self._round or self._phase == "loading"
                ):
                    self._early[sender] = event.event.round, now
            case events.Reported(sender=sender, incarnation=incarnation):
                if (place := self._running(sender, incarnation)) is not None:
                    place.heard = now
                    self._reported(place, event, now)

    def _place_of(self, peer: str) -> GoodputPlace | None:
        return next((place for place in self.places if place.peer == peer), None)

    def _running(self, peer: str, incarnation: str) -> GoodputPlace | None:
        """Where that executor of ``peer`` is the one that the round machine knows."""
        place, member = self._place_of(peer), self._members.get(peer)
        if place is None or not place.joined or member is None or member.incarnation != incarnation:
            return None
        return place

    def _heard(self, place: GoodputPlace, incarnation: str, now: int) -> None:
        """Its executor runs. Where another one trained last, that one is over, and nobody has reported it."""
        if place.trainer is not None and place.trainer != incarnation:
            self._fail(place, "executor", place.heard, now)
            place.joined, place.counted = True, False
        place.heard = now

    def _reported(self, place: GoodputPlace, event: events.Reported, now: int) -> None:
        report, effort = event.progress, place.effort
        if effort is None or effort.of != (event.sender, report.round, report.attempt):
            return
        if report.batches > effort.batches and math.isfinite(report.busy_s):
            effort.batches = report.batches
            busy = nanoseconds(max(0.0, min(report.busy_s, _LONGEST_BUSY_S)))
            place.report(busy, now, self._unserved_by(now))

    def _gone(self, place: GoodputPlace, entry: JournalEntry, now: int) -> None:
        """The round machine has lost the executor at the place. One that was let go, as its worker ends, is
        no failure.
        """
        peer, training = place.peer, place.effort is not None
        why: FailureReason = "dropped"
        sign = place.last_sign
        match entry.event:
            case events.ParticipantLost(peer=lost, reason=reason) if lost == peer:
                why = reason_of(reason)
            case events.JobRefused(peer=refusing) if refusing == peer:
                why, sign = "refused", now
            case events.Told(sender=sender, event=ExecutorError() | ExecutorExited() as ended) if (
                sender == peer
            ):
                # one that waits has nothing to report
                why, sign = "executor", place.heard if training else now
                silent_s = hung_for_s(ended.tail if isinstance(ended, ExecutorExited) else ended.message)
                if silent_s is not None:
                    why, sign = "hang", max(self.began, now - nanoseconds(silent_s))
            case _ if any(isinstance(one, events.LetGo) and one.peer == peer for one in entry.actions):
                place.over()
                if training:
                    place.turn("waiting-for-theta", now)
                return
        self._fail(place, why, sign, now)

    def _begin_generation(self, generation: events.GenerationBegan, reached: int, now: int) -> None:
        """The generation before, if there was one, had ``reached`` that round."""
        first, start = self._first is None, generation.start
        self._begun, self._over = True, False
        self._first = start.round if self._first is None else min(self._first, start.round)
        self._early.clear()
        self._server = ""
        self._disturbed = True
        self._checkpoint = min(self._checkpoint, start.round)
        for place in self.places:
            place.joined = False
            trained = place.effort is not None
            if first and start.generation and place.peer:
                # leased by an earlier scheduler, it has nothing to do with this one until it is noted here
                place.lose(self.began, now)
            elif not first and start.round < reached:
                place.discard(start.round, now)
                if trained:
                    place.lose(now, now)
                place.finished = None

    def _server_lost(self, event: object, reason: str, now: int) -> None:
        """The parameter server is gone, and this generation of the job with it."""
        self._over = self._server_down = self._disturbed = True
        sign, why = self._server_sign, reason_of(reason)
        if isinstance(event, events.Told):
            sign, why = now, "executor" if why == "other" else why
        elif isinstance(event, events.JobRefused):
            sign, why = now, "refused"
        for place in self.places:
            if place.peer and place.effort is None and not place.failed:
                place.lose(sign, now, keep_training=True)
        self.recoveries.failed(None, self._server, why, sign, now)

    def _unserved_by(self, now: int) -> int:
        since = self._unserved_since
        return self._unserved + (0 if since is None else max(0, now - since))

    def _recorded(self, entry: LedgerRound, now: int) -> None:
        contributors = {part.worker: part.incarnation for part in entry.contributors}
        inside = {place for place in self.places if place.peer in contributors}
        if not self._disturbed and len(inside) == len(self.places) and entry.duration_s > 0:
            self._calm.append(entry.samples / entry.duration_s)
        for place in self.places:
            place.applied(entry.round, contributors, now)
            place.finished = None
        self._disturbed = any(place.failed or not place.peer for place in self.places)
        self.recoveries.applied({*inside, None}, now)

    def _look(self, now: int) -> None:
        """Each place does what follows from all that."""
        short = self._server_lease is None or any(not place.peer for place in self.places)
        members = self._members
        for place in self.places:
            member = members.get(place.peer) if place.joined else None
            if member is not None and not self._over:
                self._follow(place, member, now)
            if place.effort is None:
                if self._server_down and member is not None and member.loaded and not place.failed:
                    place.failed = True
                place.turn(self._reason(place, member, short), now)

    def _follow(self, place: GoodputPlace, member: Member, now: int) -> None:
        """What its training executor does in the open round."""
        if member.started != self._round or self._phase not in (*OPEN, "closing"):
            return
        of = (place.peer, member.started, member.attempt)
        if member.fixed:
            if place.effort is not None:
                place.turn("waiting-for-theta", now)
                place.finished = of
            if member.accepted:
                self._back(place, now)
        elif member.started_at >= member.since and (place.effort is None or place.effort.of != of):
            # it runs on the theta that it was sent last
            early_round, early_at = self._early.pop(place.peer, (-1, now))
            at = early_at if early_round == self._round else now
            place.trainer = member.incarnation
            if place.finished == of:
                # reported again after another generation of the job began
                self._back(place, at)
                return
            if member.attempt:
                place.discard(member.started, at, before_attempt=member.attempt)
            self._back(place, at)
            place.train(Effort(*of, member.incarnation, self._unserved_by(at)), at)

    def _back(self, place: GoodputPlace, at: int) -> None:
        """What failed there, or the job's generation that it waited for, goes on."""
        if place.failed:
            place.failed = False
            self.recoveries.replaced(place, at)

    def _reason(self, place: GoodputPlace, member: Member | None, short: bool) -> str:
        if place.failed:
            return "failure"
        if self._phase in ("exporting", "done", "failed"):
            return "waiting-for-theta"
        if not place.peer or self._server_lease is None:
            return "allocating"
        if member is None or not member.loaded:
            return "loading"
        if self._phase == "loading":
            return "allocating" if short else "loading"
        if place.what == "replayed" and member.started < self._round:
            # it was left out, and goes on with what counts no more until it gets the next theta
            return "replayed"
        if member.accepted and self._phase in OPEN:
            machine = self._machine()
            paused = machine is not None and machine.paused
            return "paused" if paused else "waiting-for-stragglers"
        return "waiting-for-theta"
