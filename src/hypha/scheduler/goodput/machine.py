"""What the time of a job's worker places goes to: goodput, and badput by reason. A pure machine.

It is fed with the journal of the round machine, the allocator and the renewals, and follows what they were
told and decided; they do not know of it. For every worker that the job wants there is a place, whose every
nanosecond since the scheduler began is in exactly one of:

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

from collections import Counter
from collections.abc import Mapping
from statistics import median

from hypha.journal import JournalEntry
from hypha.messages import (
    ExecutorError,
    ExecutorExited,
    LedgerRound,
    Loaded,
    Plan,
    RoundStarted,
    UpdateReceived,
)
from hypha.scheduler.goodput.members import NANOSECONDS, GoodputMembers, TrainingMember, nanoseconds
from hypha.scheduler.goodput.place import TRAINING, GoodputPlace
from hypha.scheduler.goodput.report import GoodputNews, GoodputReport, reason_of
from hypha.scheduler.leasing.allocator import NAME as ALLOCATOR
from hypha.scheduler.leasing.renewal import NAME as RENEWAL
from hypha.scheduler.rounds import events
from hypha.scheduler.rounds.machine import NAME as ROUNDS
from hypha.scheduler.rounds.state import OPEN
from hypha.telemetry.instruments import BADPUT_REASONS


class Goodput(GoodputMembers):
    """Of a job that wants ``places`` workers, whose scheduler began at ``began`` (seconds of the clock that
    the journal's entries have).
    """

    def resume(self, samples: Mapping[int, int]) -> None:
        """An earlier scheduler of the job has left these ``samples``, by round."""
        self._samples = dict(samples)
        self._total, self._here = sum(samples.values()), 0
        self._first = max(samples, default=-1) + 1

    def report(self, now: float) -> GoodputReport:
        """As far as is known at ``now``; after the job's end, as it was then."""
        at = self._at(now)
        total: Counter[str] = Counter()
        for place in self.places:
            place.add_to(total, at)
        wall_s = (at - self.began) / NANOSECONDS
        rate = self._here / wall_s if wall_s > 0 else 0.0
        calm = median(self._calm) if self._calm else None
        wanted = len(self.places) * (at - self.began)
        return GoodputReport(
            wall_s=wall_s,
            places=len(self.places),
            goodput_s=(total["goodput"] + total[TRAINING]) / NANOSECONDS,
            pending_s=total[TRAINING] / NANOSECONDS,
            badput_s={reason: total[reason] / NANOSECONDS for reason in BADPUT_REASONS},
            samples=self._total,
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
        assert self._known in (None, len(self._members)), f"{self._known} are not {sorted(self._members)}"
        assert self._total == sum(self._samples.values()), "samples were lost"

    def _at(self, now: float) -> int:
        return self.now if self.ended else max(self.now, nanoseconds(now))

    def handle(self, entry: JournalEntry) -> list[GoodputNews]:
        if self.ended:
            return []
        self._news = []
        # a machine's first entry is made before it gets the time
        now = self.now = max(self.now, nanoseconds(entry.at_s))
        if entry.machine == ROUNDS:
            self._take_round(entry, now)
        elif entry.machine == ALLOCATOR:
            self._take_allocation(entry, now)
        elif entry.machine.startswith(f"{RENEWAL}:"):
            self._take_renewal(entry, entry.machine[len(RENEWAL) + 1 :], now)
        self._look(now)
        return self._news

    def _take_round(self, entry: JournalEntry, now: int) -> None:
        event = entry.event
        if isinstance(event, events.GenerationBegan):
            self._begin_generation(event, now)
        elif isinstance(event, events.Reported):
            self._reported(event, now)
        elif isinstance(event, events.DataServed):
            self._served(event.served, now)
        elif not self._over and self._phase not in ("done", "failed"):
            self._take_event(event, now)
        for action in entry.actions:
            match action:
                case events.Send(to=to, directive=Plan(round=round_, batches=batches)):
                    self._planned(to.peer, round_, batches, now)
                case events.Drop(peer=peer, kind="train"):
                    self._gone(peer, "dropped", None, now)
                case events.LetGo(peer=peer, kind="train"):
                    self._left(peer, now)
                case events.Record(entry=record):
                    self._recorded(record, now)
                case events.Checkpointed(round=round_):
                    self._checkpoint = max(self._checkpoint, round_)
                case events.Publish():
                    self._checkpoint = self._round + 1
                case events.Restart(reason=reason):
                    self._server_lost(event, reason, now)
        before = (self._phase, self._round)
        if isinstance(entry.state, Mapping):
            self._phase, self._round = str(entry.state["phase"]), int(str(entry.state["round"]))
            takes_notice = not self._over and self._phase not in ("done", "failed")
            self._known = int(str(entry.state["members"])) if takes_notice else None
        if before != (self._phase, self._round) and self._phase != "loading" and not self._over:
            self._opened(now)

    def _take_event(self, event: object, now: int) -> None:
        match event:
            case events.Joined(ref=ref, kind="train"):
                self._joined(ref.peer)
            case events.Joined(ref=ref):
                self._server, self._server_sign = ref.peer, now
            case events.ParticipantLost(peer=peer, kind="train", reason=reason):
                self._gone(peer, reason_of(reason), None, now)
            case events.JobRefused(peer=peer, kind="train"):
                self._gone(peer, "refused", now, now)
            case events.Unreachable(peer=peer, kind="train") if peer in self._members:
                self._members[peer].absent = self._disturbed = True
                self._touch_all()
            case events.Reachable(peer=peer, kind="train") if peer in self._members:
                self._members[peer].absent = False
                self._touch_all()
            case events.Told():
                self._told(event, now)

    def _begin_generation(self, generation: events.GenerationBegan, now: int) -> None:
        first, start = self._generation is None, generation.start
        self._generation, self._over = generation, False
        self._members, self._past, self._early = {}, set(), []
        self._server = ""
        self._disturbed = True
        for number in [number for number in self._samples if number >= start.round]:
            samples = self._samples.pop(number)
            self._total -= samples
            self._here -= samples if number >= self._first else 0
        self._first = start.round if first else min(self._first, start.round)
        self._checkpoint = min(self._checkpoint, start.round)
        if first and start.generation:
            # whoever was leased before has nothing to do with this scheduler until it is noted here
            for place in self._adopted:
                place.lose(self.began, now)
                place.stalled = True
        elif start.round < self._round:
            for place in self.places:
                trained = place.effort is not None
                place.discard(start.round, now)
                if trained:
                    place.lose(now, now)
                    place.stalled = True
                place.finished = None
        self._touch_all()

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
                place.stalled = True
        self._news += self.recoveries.failed(None, self._server, why, sign, now)

    def _opened(self, now: int) -> None:
        """A round is open, or was: reports of it that came too early count now."""
        if self._server_down:
            self._server_down = False
            self._news += self.recoveries.replaced(None, now)
        early, self._early = self._early, []
        for told, at in early:
            self._told(told, at)

    def _told(self, told: events.Told, now: int) -> None:
        event = told.event
        if not self._is_current(told.stamp):
            return
        if told.kind == "aggregate":
            if told.sender == self._server:
                self._server_sign = now
                self._server_told(told, now)
            return
        member = self._members.get(told.sender)
        other = member is not None and member.incarnation not in ("", told.incarnation)
        if member is None or other or told.incarnation in self._past:
            return
        if isinstance(event, ExecutorError | ExecutorExited):
            self._executor_failed(told.sender, member, event, now)
            return
        member.incarnation, member.absent = told.incarnation, False
        self._heard(member, told.incarnation, now)
        match event:
            case Loaded():
                member.loaded = True
            case RoundStarted(round=round_):
                if self._is_early(round_):
                    self._keep_early(told, now)
                else:
                    self._started(told.sender, member, event, now)

    def _keep_early(self, told: events.Told, now: int) -> None:
        at = {id(one): when for one, when in self._early} | {id(told): now}
        self._early = [(one, at[id(one)]) for one in events.with_early([one for one, _ in self._early], told)]

    def _is_early(self, round_: int) -> bool:
        return round_ == self._round + 1 or (round_ == self._round and self._phase == "loading")

    def _server_told(self, told: events.Told, now: int) -> None:
        update = told.event
        if not isinstance(update, UpdateReceived):
            return
        if self._is_early(update.round):
            self._keep_early(told, now)
        elif update.round == self._round and update.worker in self._members:
            member = self._members[update.worker]
            member.started = self._round
            self._done(update.worker, member, now)
            member.accepted = True
            if (place := member.place) is not None:
                if place.stalled:
                    self._back(place, now)
                self._touched.add(place)

    def _recorded(self, entry: LedgerRound, now: int) -> None:
        self._samples[entry.round] = entry.samples
        self._total += entry.samples
        self._here += entry.samples
        contributors = {part.worker: part.incarnation for part in entry.contributors}
        inside = {place for place in self.places if place.peer in contributors}
        if not self._disturbed and len(inside) == len(self.places) and entry.duration_s > 0:
            self._calm.append(entry.samples / entry.duration_s)
        for place in self.places:
            place.applied(entry.round, contributors, now)
            place.finished = None
        for member in self._members.values():
            member.open_round()
        self._disturbed = any(place.failed or not place.peer for place in self.places)
        self._news += self.recoveries.applied({*inside, None}, now)

    def _look(self, now: int) -> None:
        """Each place does what follows from all that."""
        around = (self._round, self._phase, self._server_lease is None, self._server_down)
        if not self._touched and around == self._mood[: len(around)]:
            return
        members = self._members.values()
        present = sum(1 for member in members if member.loaded and not member.absent)
        paused = self._generation is not None and present < self._generation.rules.min_workers
        short = self._server_lease is None or any(not place.peer for place in self.places)
        mood = (*around, paused, short)
        if mood != self._mood:
            self._mood = mood
            self._touch_all()
        for place in self._touched:
            if place.effort is None:
                member = self._members.get(place.peer) if place.peer else None
                if self._server_down and member is not None and member.loaded and not place.failed:
                    place.failed = place.stalled = True
                place.turn(self._reason(place, member, paused, short), now)
        self._touched.clear()

    def _reason(self, place: GoodputPlace, member: TrainingMember | None, paused: bool, short: bool) -> str:
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
            return "paused" if paused else "waiting-for-stragglers"
        return "waiting-for-theta"
