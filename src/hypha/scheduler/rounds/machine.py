"""The round machine: the only authority on which round it is, who takes part and when it is applied.

Training -> Scheduled -> Updating -> Closing -> the next round; nothing but the parameter server's
``RoundApplied`` advances the round. Workers may come, go, hang, repeat and reorder themselves at any
moment. Pure: :meth:`RoundMachine.handle` takes an event and the monotonic time and returns actions.
"""

from __future__ import annotations

import logging

from hypha.errors import REFUSALS
from hypha.journal import Journal
from hypha.messages import (
    CheckpointSaved,
    ExecutorError,
    ExecutorExited,
    Export,
    Exported,
    Loaded,
    ModelReady,
    PeerRef,
    Progress,
    RoundApplied,
    RoundStarted,
    UpdateReceived,
    UpdateRefused,
    UpdateSent,
)
from hypha.messages import Event as ExecutorEvent
from hypha.scheduler.data.slices import Assignment, SliceTracker
from hypha.scheduler.rounds.closing import PATIENCE, STALLED
from hypha.scheduler.rounds.events import (
    Action,
    AnswerSlice,
    Checkpointed,
    DataServed,
    Disregarded,
    Drop,
    FirstTheta,
    GenerationBegan,
    GoesOn,
    Input,
    JobRefused,
    Joined,
    LeasesHeld,
    LetGo,
    ParticipantLeaves,
    ParticipantLost,
    Publish,
    Reachable,
    Record,
    Reported,
    SliceAsked,
    TimePassed,
    Told,
    Unreachable,
    with_early,
)
from hypha.scheduler.rounds.failures import exit_text
from hypha.scheduler.rounds.participants import Member
from hypha.scheduler.rounds.phases import Phases
from hypha.scheduler.rounds.policy import CarriedOver, Rules, Start
from hypha.scheduler.rounds.state import OPEN

logger = logging.getLogger(__name__)

#: of the entries in a journal
NAME = "rounds"
#: Workers that may be gone by the time that the parameter server has their updates of the open round; it
#: could name others without end.
_MOST_GONE = 100


class RoundMachine(Phases):
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
                return self._progress(event, now)
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
            return self._server_told(told, now)
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
            return self._worker_told(member, told, now)
        return []

    def _worker_told(self, member: Member, told: Told, now: float) -> list[Action]:
        event: ExecutorEvent = told.event
        match event:
            case Loaded():
                return self._worker_loaded(member, now)
            case RoundStarted():
                return self._round_started(member, told, event, now)
            case UpdateSent():
                # the parameter server reports it when it has added it
                return []
            case ExecutorError() | ExecutorExited():
                # the others do its part from now on, whatever becomes of it
                gone = self.lose(member.peer, "train", "its executor failed")
                if self.phase == "exporting":
                    return gone  # nobody needs it any more
                if member.leaves is not None:
                    text = "its worker leaves, and its executor has ended"
                    return [LetGo(member.peer, "train", text), *gone]
                failed = self.failing.failed(member.peer, told.incarnation, event, now, tuple(self.members))
                return [*self.judged(failed), *gone]
            case _:
                self.counts["foreign event"] += 1
                return []

    def _server_told(self, told: Told, now: float) -> list[Action]:
        event: ExecutorEvent = told.event
        match event:
            case ModelReady():
                return self._model_ready(event)
            case UpdateReceived():
                return self._update_received(told, event, now)
            case UpdateRefused():
                return self._update_refused(event)
            case RoundApplied() if self.start.taken_over and self.is_early(event.round):
                self.early = with_early(self.early, told)
                return []
            case RoundApplied():
                return self._round_applied(event, now)
            case CheckpointSaved():
                self.saved = max(self.saved, event.round)
                return [Checkpointed(event.round, event.place)]
            case Exported() if self.phase == "exporting":
                self.phase = "done"
                return [Publish(event.files)]
            case ExecutorError(kind="checkpoint") if self.phase == "loading" and self.start.round:
                # no fault of its worker
                return self.restart(event.message, unusable=True)
            case ExecutorError():
                return self.failed(told.sender, "aggregate", event.message, event.kind)
            case ExecutorExited():
                return self.failed(told.sender, "aggregate", exit_text(event), "exit")
            case _:
                self.counts["foreign event"] += 1
                return []

    # --- what workers say -----------------------------------------------------------------------------

    def _worker_loaded(self, member: Member, now: float) -> list[Action]:
        if member.loaded:
            return []
        member.loaded, member.load_s = True, now - member.joined_at
        if self.phase not in (*OPEN, "closing"):
            return []
        # past Training, or if an earlier generation's update is in, it gets the next theta with everybody
        # else
        now_or_next = self.phase == "training" and member.peer not in self.updates.accepted
        join = self.send_model(member, now) if now_or_next else []
        return [*self.tell_members(), *join]

    def _round_started(self, member: Member, told: Told, event: RoundStarted, now: float) -> list[Action]:
        if self.is_early(event.round):
            self.early = with_early(self.early, told)
        elif event.round != self.round or not member.in_round:
            self.counts["stale round"] += 1
        elif event.attempt < member.attempt:
            self.counts["stale attempt"] += 1
        elif event.theta != self.theta:
            self.counts["wrong theta"] += 1
            logger.error(
                "A worker started round %d from another theta; it is sent the right one",
                self.round,
                extra={"worker_peer_id": member.peer, "job_id": self.start.job_id},
            )
            return self.send_model(member, now)
        elif not member.fixed and not (member.started == self.round and member.batches):
            size = member.batch_size if event.batch_size is None else event.batch_size
            if size != member.batch_size and not 0 < size <= (self.rules.most_batch_size or 0):
                return self._impossible(member, f"its batches have {size} samples")
            # a higher one is from an earlier generation
            member.attempt = event.attempt
            if size != member.batch_size:
                member.resize(size)
            member.start(self.round, now)
            self.planner.upset()
        return []

    def _progress(self, event: Reported, now: float) -> list[Action]:
        member, stamp, report = self.members.get(event.sender), event.stamp, event.progress
        if member is None or stamp.job_id != self.start.job_id:
            self.counts["uninvited"] += 1
        elif stamp.generation != self.start.generation or member.incarnation != event.incarnation:
            self.counts["stale generation"] += 1
        elif report.round != self.round or member.started != self.round or not member.in_round:
            self.counts["stale round"] += 1
        elif report.attempt != member.attempt:
            self.counts["stale attempt"] += 1
        elif not (taken := self._take_progress(member, report, now)):
            self.counts["old or impossible counts"] += 1
            if taken is None and not member.left_out:
                text = f"{report.samples} samples in {report.batches} batches of round {self.round}"
                return self._impossible(member, f"it reports {text}")
        return []

    def _take_progress(self, member: Member, report: Progress, now: float) -> bool | None:
        return member.progress(report, now, self.may_use(member), self.open_before)

    def _impossible(self, member: Member, what: str) -> list[Action]:
        """What a worker says of itself cannot be; who goes on like that is replaced."""
        member.impossible += 1
        logger.warning(
            "A worker states what cannot be (%s); it is not believed",
            what,
            extra={"worker_peer_id": member.peer, "job_id": self.start.job_id},
        )
        if member.impossible < PATIENCE:
            return []
        return self.failed(member.peer, "train", f"it states what cannot be: {what}", "claims")

    # --- what the parameter server says -----------------------------------------------------------------

    def _model_ready(self, event: ModelReady) -> list[Action]:
        server = self.server
        if self.server_ready or server is None or self.phase != "loading":
            self.counts["stale round"] += 1
            return []
        if event.round == self.round + 1 and self.start.taken_over and self.round == self.start.round:
            # the scheduler before this one had closed the round; RoundApplied says with what
            self.server_ready, self.theta, self.server_at = True, self.start.theta, event.round
            return []
        if event.round != self.round:
            text = f"the parameter server is at round {event.round}, not {self.round}"
            return self.failed(server.peer, "aggregate", text, "internal")
        if self.start.theta and event.theta != self.start.theta:
            text = f"the parameter server restored another theta than that of round {self.round}"
            return self.failed(server.peer, "aggregate", text, "data")
        for note in event.notes:
            logger.warning("The model: %s", note, extra={"job_id": self.start.job_id})
        self.server_ready, self.theta, self.server_at = True, event.theta, event.round
        self.early = [told for told in self.early if told.stamp.round <= self.round]
        if self.round >= self.rules.rounds:
            self.phase = "exporting"
            return self.to_server(Export(to=self.scheduler))
        return []

    def _update_received(self, told: Told, event: UpdateReceived, now: float) -> list[Action]:
        if self.is_early(event.round):
            self.early = with_early(self.early, told)
            return []
        if event.round != self.round or self.phase not in (*OPEN, "closing"):
            self.counts["stale round"] += 1
            return []
        worker, accepted = event.worker, self.updates.accepted
        if worker not in self.members and len(accepted) >= len(self.members) + _MOST_GONE:
            self.counts["uninvited"] += 1
            return []
        if problem := self.claim_problem(worker, event.contribution):
            self.counts["wrong contribution"] += 1
            text = f"the parameter server accepted an update that cannot be what it states: {problem}"
            return self.failed(told.sender, "aggregate", text, "claims")
        if event.contribution is not None:
            self.updates.accept(event.contribution)
        member = self.members.get(worker)
        if member is not None:
            member.overtake(self.round)
            member.accept(now)
            if member.early:
                self.updates.departed.add(member.peer)
        return []

    def _update_refused(self, event: UpdateRefused) -> list[Action]:
        code = event.code if event.code in REFUSALS else "another code"
        self.counts[f"update refused: {code}"] += 1
        member = self.members.get(event.worker)
        # of a stale one, what was applied tells the rest: it may be a second copy of one that counts
        settled = event.code in ("duplicate", "stale")
        if member is None or event.round != self.round or settled or member.accepted:
            return []
        return self._refuse_update(member, event.code, event.reason)

    def _refuse_update(self, member: Member, code: str, reason: str) -> list[Action]:
        logger.warning(
            "An update was refused (%s): %s; its worker starts over",
            code,
            reason,
            extra={"worker_peer_id": member.peer, "job_id": self.start.job_id},
        )
        member.refused += 1
        if member.refused >= PATIENCE:
            return self.failed(member.peer, "train", f"its updates are refused: {reason}", code)
        self.leave_out(member)
        return []

    def _round_applied(self, event: RoundApplied, now: float) -> list[Action]:
        if event.round != self.round or self.phase not in (*OPEN, "closing"):
            self.counts["stale round"] += 1
            return []
        for part in event.contributions:
            # of a parameter server of an earlier version, to a scheduler that takes over
            if part.worker in event.contributors and not self.claim_problem(part.worker, part):
                self.updates.accept(part)
        entry = self.updates.entry(event, self.start.generation, now)
        for part in entry.contributors:
            foreign = self.tracker.finish(part.worker, part.finished)
            self.counts["foreign slices"] += len(foreign)
            self.count_steps(part)
            if part.worker in self.members:
                self.members[part.worker].total_samples += part.samples
        for worker in self.updates.accepted.keys() - set(event.contributors):
            self.tracker.give_back(worker, self.updates.finished(worker))
        drops: list[Action] = []
        for member in list(self.participants):
            if member.peer not in event.contributors:
                member.stalled += member.overdue
                self.leave_out(member)
                hopeless = member.missed >= PATIENCE or member.stalled >= STALLED
                if not member.absent and hopeless and self.round + 1 < self.rules.rounds:
                    text = f"left out of {member.missed} rounds in a row"
                    if member.stalled >= STALLED:
                        text = f"it began {member.stalled} rounds in a row, and sent no update in time"
                    drops += [Drop(member.peer, "train", text), *self.lose(member.peer, "train", text)]
        self.failures.applied(event.contributors)
        self.round, self.theta = self.round + 1, event.theta
        # the ledger has them with the round
        self.kept = self.tracker.version
        actions: list[Action] = [Record(entry, self.tracker.to_state(), self.steps), *drops]
        if self.round >= self.rules.rounds:
            self.phase = "exporting"
            return [*actions, *self.to_server(Export(to=self.scheduler))]
        self.broadcast |= self.holders()
        return actions + self.open_round(now)
