"""What the round machine's events and actions mean for the time of places: who trains, waits, is lost.

It keeps a picture of the machine's members, and believes what the machine believes: what is late, foreign or
of another generation of the job changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

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
from hypha.scheduler.goodput.members import GoodputMembers, TrainingMember
from hypha.scheduler.goodput.place import GoodputPlace
from hypha.scheduler.goodput.recovery import reason_of
from hypha.scheduler.rounds import events
from hypha.scheduler.rounds.state import OPEN


class Following(GoodputMembers):
    """The part of :class:`hypha.scheduler.goodput.machine.Goodput` that follows the round machine."""

    def take_round(self, entry: JournalEntry, now: int) -> None:
        """An entry of the round machine."""
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
                case _:
                    pass
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
                self._touched.update(range(len(self.places)))
            case events.Reachable(peer=peer, kind="train") if peer in self._members:
                self._members[peer].absent = False
                self._touched.update(range(len(self.places)))
            case events.Told():
                self._told(event, now)
            case _:
                pass

    def _begin_generation(self, generation: events.GenerationBegan, now: int) -> None:
        first, start = self._generation is None, generation.start
        self._generation, self._over, self._began_generation = generation, False, True
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
            for number in self._adopted:
                self.places[number].lose(self.began, now)
                self._stalled.add(number)
        elif start.round < self._round:
            for number, place in enumerate(self.places):
                trained = place.effort is not None
                place.discard(start.round, now)
                if trained:
                    place.lose(now, now)
                    self._stalled.add(number)
                self._finished.pop(number, None)
        self._touched.update(range(len(self.places)))

    def _server_lost(self, event: object, reason: str, now: int) -> None:
        """The parameter server is gone, and this generation of the job with it."""
        self._over = self._server_down = self._disturbed = True
        sign, why = self._server_sign, reason_of(reason)
        if isinstance(event, events.Told):
            sign, why = now, "executor" if why == "other" else why
        elif isinstance(event, events.JobRefused):
            sign, why = now, "refused"
        for number, place in enumerate(self.places):
            if place.peer and place.effort is None and not place.failed:
                place.lose(sign, now, keep_training=True)
                self._stalled.add(number)
        self._news += self.recoveries.failed(None, "aggregate", self._server, why, sign, now)

    def _opened(self, now: int) -> None:
        """A round is open, or was: reports of it that came too early count now."""
        if self._server_down:
            self._server_down = False
            self._news += self.recoveries.replaced(None, now)
        early, self._early = self._early, []
        for told, at in early:
            self._told(told, at)

    def _told(self, told: events.Told, now: int) -> None:
        generation, stamp, event = self._generation, told.stamp, told.event
        if generation is None or (stamp.job_id, stamp.generation) != (
            generation.start.job_id,
            generation.start.generation,
        ):
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
            case _:
                pass

    def _keep_early(self, told: events.Told, now: int) -> None:
        at = {id(one): when for one, when in self._early} | {id(told): now}
        self._early = [(one, at[id(one)]) for one in events.with_early([one for one, _ in self._early], told)]

    def _is_early(self, round_: int) -> bool:
        return round_ == self._round + 1 or (round_ == self._round and self._phase == "loading")

    def _server_told(self, told: events.Told, now: int) -> None:
        match told.event:
            case UpdateReceived(round=round_, worker=worker):
                if self._is_early(round_):
                    self._keep_early(told, now)
                elif round_ == self._round and worker in self._members:
                    member = self._members[worker]
                    member.started = self._round
                    self._done(worker, member, now)
                    member.accepted = True
                    if member.place in self._stalled:
                        self._back(member.place, now)
                    if member.place is not None:
                        self._touched.add(member.place)
            case _:
                pass

    def _recorded(self, entry: LedgerRound, now: int) -> None:
        """A round was applied."""
        self._samples[entry.round] = entry.samples
        self._total += entry.samples
        self._here += entry.samples
        contributors = {part.worker: part.incarnation for part in entry.contributors}
        inside = {one for one, place in enumerate(self.places) if place.peer in contributors}
        if not self._disturbed and len(inside) == len(self.places) and entry.duration_s > 0:
            self._calm.append(entry.samples / entry.duration_s)
        for place in self.places:
            place.applied(entry.round, contributors, now)
        for member in self._members.values():
            member.open_round()
        self._finished.clear()
        self._disturbed = any(place.failed or not place.peer for place in self.places)
        self._news += self.recoveries.applied({*inside, None}, now)

    def look(self, now: int) -> None:
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
            self._touched.update(range(len(self.places)))
        for number in self._touched:
            place = self.places[number]
            if place.effort is None:
                member = self._members.get(place.peer) if place.peer else None
                if self._server_down and member is not None and member.loaded and not place.failed:
                    place.failed = True
                    self._stalled.add(number)
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
