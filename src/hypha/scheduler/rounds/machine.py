"""The round machine: the only authority on which round it is, who takes part and when it is applied.

Training -> Scheduled -> Updating -> Closing -> the next round; nothing but the parameter server's
``RoundApplied`` advances the round. Workers may come, go, hang, repeat and reorder themselves at any
moment. Pure: :meth:`RoundMachine.handle` takes an event and the monotonic time and returns actions.
"""

from __future__ import annotations

from hypha.journal import Journal
from hypha.messages import ExecutorExited, PeerRef
from hypha.scheduler.data.slices import Assignment, SliceTracker
from hypha.scheduler.rounds.events import (
    Action,
    AnswerSlice,
    DataServed,
    Disregarded,
    FirstTheta,
    GenerationBegan,
    GoesOn,
    Input,
    JobRefused,
    Joined,
    LeasesHeld,
    ParticipantLeaves,
    ParticipantLost,
    Reachable,
    Reported,
    SliceAsked,
    TimePassed,
    Told,
    Unreachable,
)
from hypha.scheduler.rounds.policy import CarriedOver, Rules, Start
from hypha.scheduler.rounds.server_reports import ServerReports
from hypha.scheduler.rounds.worker_reports import WorkerReports

#: of the entries in a journal
NAME = "rounds"


class RoundMachine(WorkerReports, ServerReports):
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
        self._first_theta = ""
        self._journal = journal
        if journal is not None:
            began = GenerationBegan(rules, start, tracker.to_state(), scheduler, carried)
            journal.note(NAME, 0.0, began, (), self.summary())

    def handle(self, event: Input, now: float) -> list[Action]:
        """What is to be done about ``event``; never raises for what a peer said."""
        actions = self._apply(event, now)
        if self._journal is not None:
            self._journal.note(NAME, now, event, actions, self.summary())
            if self._journal.checked:
                self.validate()
        return actions

    def _apply(self, event: Input, now: float) -> list[Action]:
        if isinstance(event, SliceAsked):
            # asking moves nothing but slices
            return self._slice_asked(event)
        if self.over or self.phase in ("done", "failed"):
            return []
        actions = self._react(event, now) + self.advance(now)
        if self.theta and self.round == 0 and not self._first_theta:
            self._first_theta = self.theta
            actions.append(FirstTheta(self.theta))
        if isinstance(event, TimePassed) and self.tracker.version != self.kept and not self.over:
            actions.append(self.keep_slices())
        return actions

    def _react(self, event: Input, now: float) -> list[Action]:
        match event:
            case Joined():
                self.join(event, now)
            case GoesOn(peer=peer, kind="train"):
                if peer in self.members and peer in self.had_model:
                    self.members[peer].told_at = now
            case ParticipantLost():
                if event.kind == "train":
                    self.failing.forget(event.peer)
                return self.lose(event.peer, event.kind, event.reason)
            case JobRefused(peer=peer, kind=kind, reason=reason):
                # a worker that will not do the job is as bad as one that fails at it
                if kind == "train":
                    self.failing.forget(peer)
                return self.failed(peer, kind, reason, "refused")
            case Unreachable(peer=peer, kind="train"):
                self.set_absent(peer, True)
            case Reachable(peer=peer, kind="train"):
                self.set_absent(peer, False)
                if peer in self.members:
                    self.members[peer].expect(now)
            case GoesOn() | Unreachable() | Reachable():
                pass
            case ParticipantLeaves():
                self.leaves(event, now)
            case Reported():
                return self.progress_reported(event, now)
            case Told():
                return self.told(event, now)
            case LeasesHeld():
                self.leases = event
                return self.wait_for_leases(now)
            case DataServed(served=served):
                if served and not self.served:
                    for member in self.members.values():
                        member.expect(now)
                self.served = served
            case Disregarded(what=what):
                self.counts[what] += 1
            case TimePassed():
                return self.wait_for_leases(now)
            case SliceAsked():
                pass
        return []

    # --- slices ---------------------------------------------------------------------------------------

    def _slice_asked(self, asked: SliceAsked) -> list[Action]:
        """The slice for a member's question, or why there is none right now; what changes is kept first."""
        caller, request = asked.caller, asked.request
        got = self.next_slice(asked)
        if not isinstance(got, Assignment):
            return [AnswerSlice(caller, request.seq, reason=got)]
        answer = AnswerSlice(caller, request.seq, got, self.tracker.version, self.ahead)
        return [self.keep_slices(), answer] if self.tracker.version != self.kept else [answer]

    # --- what executors say ---------------------------------------------------------------------------

    def told(self, told: Told, now: float) -> list[Action]:
        stamp = told.stamp
        server = self.server is not None and told.sender == self.server.peer
        member = self.members.get(told.sender)
        if (stamp.job_id, stamp.generation) != (self.start.job_id, self.start.generation):
            self.counts["stale generation"] += 1
        elif told.kind == "aggregate" and server:
            return self.server_told(told, now)
        elif told.kind == "train" and self.failing.is_over(told.incarnation):
            self.counts["stale incarnation"] += 1
            if isinstance(told.event, ExecutorExited):
                return self.judged(self.failing.exited(told.incarnation, told.event))
        elif told.kind == "aggregate" or member is None:
            self.counts["uninvited"] += 1
        elif member.incarnation and told.incarnation != member.incarnation:
            self.counts["stale incarnation"] += 1
        else:
            member.incarnation = told.incarnation
            self.set_absent(member.peer, False)
            return self.worker_told(member, told, now)
        return []
