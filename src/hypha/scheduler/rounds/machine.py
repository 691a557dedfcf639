"""The round machine: the only authority on which round it is, who takes part and when it is applied.

Training -> Scheduled -> Updating -> Closing -> the next round; nothing but the parameter server's
``RoundApplied`` advances the round. Workers may come, go, hang, repeat and reorder themselves at any
moment. Pure: :meth:`RoundMachine.handle` takes an event and the monotonic time and returns actions.
"""

from __future__ import annotations

from hypha.errors import AllocationFailed
from hypha.journal import Journal
from hypha.messages import CloseRound, PeerRef, Plan, SaveCheckpoint, SendModel
from hypha.scheduler.data.slices import Assignment, SliceTracker
from hypha.scheduler.rounds import events
from hypha.scheduler.rounds.closing import given_up, is_overdue, may_close, never_loaded, stuck
from hypha.scheduler.rounds.events import Action
from hypha.scheduler.rounds.policy import CarriedOver, Rules, Start
from hypha.scheduler.rounds.reports import ExecutorReports
from hypha.scheduler.rounds.state import OPEN

#: of the entries in a journal
NAME = "rounds"


class RoundMachine(ExecutorReports):
    """One generation of a job. ``counts`` counts what was ignored or refused, by reason. It is at its
    end with :class:`Publish`, :class:`Fail` or :class:`Restart`; of these the last goes on in another
    generation.
    """

    def __init__(
        self,
        rules: Rules,
        start: Start,
        tracker: SliceTracker,
        scheduler: PeerRef,
        carried: CarriedOver = CarriedOver(),  # noqa: B008 - frozen
        journal: Journal | None = None,
    ) -> None:
        super().__init__(rules, start, tracker, scheduler, carried)
        self._journal = journal
        if journal is not None:
            began = events.GenerationBegan(rules, start, tracker.to_state(), scheduler, carried)
            journal.note(NAME, 0.0, began, (), self.summary())

    def handle(self, event: events.Input, now: float) -> list[Action]:
        """What is to be done about ``event``; never raises for what a peer said."""
        self.decided = []
        if isinstance(event, events.SliceAsked):
            # asking moves nothing but slices
            self._slice_asked(event)
        elif not self.over and self.phase not in ("done", "failed"):
            self._react(event, now)
            self._advance(now)
            if isinstance(event, events.TimePassed) and self.tracker.version != self.kept and not self.over:
                self.keep_slices()
        if self._journal is not None:
            self._journal.note(NAME, now, event, self.decided, self.summary())
            if self._journal.checked:
                self.validate()
        return self.decided

    def _react(self, event: events.Input, now: float) -> None:
        match event:
            case events.Joined():
                self.join(event, now)
            case events.GoesOn(peer=peer, kind="train"):
                if peer in self.members and peer in self.had_model:
                    self.members[peer].told_at = now
            case events.ParticipantLost():
                if event.kind == "train":
                    self.failures.forget(event.peer)
                self.lose(event.peer, event.kind, event.reason)
            case events.JobRefused(peer=peer, kind=kind, reason=reason):
                # a worker that will not do the job is as bad as one that fails at it
                if kind == "train":
                    self.failures.forget(peer)
                self.failed(peer, kind, reason, "refused")
            case events.Unreachable(peer=peer, kind="train"):
                self.set_absent(peer, True)
            case events.Reachable(peer=peer, kind="train"):
                self.set_absent(peer, False)
                if peer in self.members:
                    self.members[peer].expect(now)
            case events.ParticipantLeaves():
                self.leaves(event, now)
            case events.Reported():
                self.progress_reported(event, now)
            case events.Told():
                self.told(event, now)
            case events.LeasesHeld():
                self.leases = event
                self._wait_for_leases(now)
            case events.DataServed(served=served):
                if served and not self.served:
                    for member in self.members.values():
                        member.expect(now)
                self.served = served
            case events.Disregarded(what=what):
                self.counts[what] += 1
            case events.TimePassed():
                self._wait_for_leases(now)

    def _slice_asked(self, asked: events.SliceAsked) -> None:
        """The slice for a member's question, or why there is none right now; what changes is kept first."""
        got = self.next_slice(asked)
        if not isinstance(got, Assignment):
            self.decide(events.AnswerSlice(reason=got))
            return
        if self.tracker.version != self.kept:
            self.keep_slices()
        self.decide(events.AnswerSlice(got, self.ahead))

    def _advance(self, now: float) -> None:
        """What time, or the sum of what was said, asks for."""
        if self.over or self.phase in ("exporting", "done", "failed"):
            return
        for judged in self.failures.overdue(now):
            self.decide(judged)
        members = self.members.values()
        for member, why in [*stuck(members, self.rules, now), *never_loaded(members, self.rules, now)]:
            if self.phase != "failed":
                self.failed(member.peer, "train", why, "overdue")
        self._see_off(now)
        if self.over:
            return
        if self.phase == "loading" and self._may_begin(now):
            self.broadcast = self.holders()
            self.tell_members()
            self.open_round(now)
        if self.phase in OPEN and not self.participants and not self.updates.accepted and self.loaded:
            self.broadcast = frozenset()
            self.open_round(now, again=True)
        if self.phase in OPEN:
            self._plan(now)
            self.tell_limits()
            self._resend(now)
            self._close(now)

    def _may_begin(self, now: float) -> bool:
        """With all workers that are wanted; with fewer only when the others do not come soon. A round that an
        earlier generation has begun is open in any case.
        """
        if len(self.present) < self.rules.min_workers:
            self.enough_since = None
            return False
        self.enough_since = now if self.enough_since is None else self.enough_since
        everybody = len(self.present) >= self.rules.workers or self.start.taken_over
        return self.server_ready and (everybody or now >= self.enough_since + self.rules.start_grace_s)

    def _see_off(self, now: float) -> None:
        """Whoever leaves and has nothing more to contribute is let go; a parameter server that leaves saves
        what it holds, and goes when another worker is there for it.
        """
        for member in list(self.members.values()):
            if member.leaves is None or member.absent:
                continue
            trains = member.in_round and not member.left_out and member.started == self.round
            under_way = not member.accepted and (trains or member.fixed)
            last = member.accepted and member.early
            if last or not (under_way or member.can_begin(now)):
                self.let_go(member.peer, "train")
        server, held = self.server, self.leases
        if self.server_leaves is None or server is None or self.phase not in OPEN:
            return
        if self.saving < self.round:
            self.saving = self.round
            self.to_server(SaveCheckpoint(round=self.round))
        if self.saved == self.round and held is not None and held.aggregate > 1 and not self.hurried:
            self.let_go(server.peer, "aggregate")

    def _plan(self, now: float) -> None:
        accepted = self.updates.stayed
        members = [one for one in self.participants if not (one.accepted or one.absent)]
        for member in members:
            if not member.fixed:
                member.foresee(now, self.round, self.hurried)
        changed = self.planner.plan(members, self.updates.samples, self.round, now, close=bool(accepted))
        for member in members:
            planned = changed.get(member.peer, member.plan)
            if member.last is None or member.fixed or (planned is not None and planned <= member.last):
                continue
            # it cannot wait for the others
            changed.pop(member.peer, None)
            if member.plan != member.last:
                changed[member.peer] = member.last
        for peer, batches in changed.items():
            member = self.members[peer]
            member.set_plan(batches, now, self.round)
            self.decide(events.Send(member.ref, "train", Plan(round=self.round, batches=batches)))
        if self.phase == "training" and (self.planner.final or accepted):
            self.phase = "scheduled"
        if self.phase == "scheduled" and accepted:
            self.phase = "updating"

    def _resend(self, now: float) -> None:
        """A theta that did not arrive is sent again, ever more seldom."""
        for member in self.participants:
            if member.started < self.round and now >= member.resend_at:
                member.resend_after_s *= 2.0
                member.resend_at = now + member.resend_after_s
                self.to_server(SendModel(to=member.ref, attempt=member.attempt))

    def _close(self, now: float) -> None:
        updates, rules = self.updates, self.rules
        if not updates.accepted:
            for member, why in given_up(self.participants, rules, self.round, now) if self.served else []:
                if self.phase in OPEN:
                    self.failed(member.peer, "train", why, "overdue")
            return
        if self.paused or not self.loaded:
            updates.quorum_since = None
            return
        if not may_close(updates, self.participants, rules, self.round, now, not self.served):
            return
        self.phase = "closing"
        for member in self.participants:
            begun = member.started == self.round and not (member.accepted or member.absent)
            member.overdue = begun and is_overdue(member, rules, self.round, now)
        self.broadcast = frozenset(member.peer for member in self.loaded)
        final = self.round + 1 >= rules.rounds
        due = (self.round + 1) % rules.checkpoint_every == 0
        checkpoint = final or due or self.server_leaves is not None
        self.to_server(CloseRound(round=self.round, final=final, checkpoint=checkpoint))

    def _wait_for_leases(self, now: float) -> None:
        """The job ends when there were too few leases for longer than it wants to wait."""
        held, wait_s = self.leases, self.rules.wait_s
        if held is None:
            return
        if held.train >= self.rules.min_workers and held.aggregate:
            self.short_since = None
            return
        self.short_since = now if self.short_since is None else self.short_since
        if wait_s is not None and now - self.short_since >= wait_s:
            advice = "start more workers, ask for less or raise price.max"
            self.decide(events.Fail(AllocationFailed(f"after {wait_s:g} s still {held.missing}; {advice}")))

    def validate(self) -> None:
        """Assert what always holds between two events. For tests and simulation."""
        self.tracker.validate()
        rules, start = self.rules, self.start
        assert start.round <= self.round <= max(rules.rounds, start.round), f"round {self.round}"
        assert self.steps >= start.steps, "inner steps went back"
        assert not self.server_ready or self.server is not None, "a parameter server that is gone is ready"
        if not self.over and self.phase in (*OPEN, "closing", "exporting"):
            assert self.server_ready, f"{self.phase} without a parameter server"
        if self.phase in OPEN:
            assert self.round < rules.rounds, "a round after the last one is open"
            assert self.theta, "a round without theta is open"
        if self.phase == "exporting":
            assert self.round >= rules.rounds, f"exported before round {self.round} was applied"
        assert self.kept <= self.tracker.version, "slices were kept that are not there yet"
        assert self.failures.in_a_row >= 0
        self._validate_members()

    def _validate_members(self) -> None:
        for peer, member in self.members.items():
            assert peer == member.peer, f"{member.peer} is known as {peer}"
            assert member.started <= self.round, f"{peer} is in a round that was not opened"
            assert not member.accepted or peer in self.updates.accepted, f"{peer} was not accepted"
            assert not (member.left_out and member.accepted), f"{peer} is left out, but its update counts"
            assert member.plan is None or member.plan >= 0, f"{peer} is to do {member.plan} batches"
            assert member.batches >= 0, f"{peer} has done {member.batches} batches"
        for worker, part in self.updates.accepted.items():
            assert part.worker == worker, f"{worker} has the update of {part.worker}"
            assert part.samples > 0, "an update of no samples"
        for told in self.early:
            assert told.stamp.generation == self.start.generation, "what another generation said is waiting"
