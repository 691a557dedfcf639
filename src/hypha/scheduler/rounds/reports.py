"""What executors report to the round machine, and how a round begins with what was reported of it."""

from __future__ import annotations

import logging

from hypha.errors import REFUSALS
from hypha.messages import (
    CheckpointSaved,
    ExecutorError,
    ExecutorExited,
    Export,
    Exported,
    Loaded,
    ModelReady,
    RoundApplied,
    RoundStarted,
    UpdateReceived,
    UpdateRefused,
    UpdateSent,
)
from hypha.scheduler.rounds import events
from hypha.scheduler.rounds.closing import PATIENCE, STALLED, RoundContributions
from hypha.scheduler.rounds.events import Told
from hypha.scheduler.rounds.failures import exit_text
from hypha.scheduler.rounds.participants import Member
from hypha.scheduler.rounds.planning import Planner
from hypha.scheduler.rounds.state import OPEN, RoundState

logger = logging.getLogger(__name__)

#: Workers that may be gone by the time that the parameter server has their updates of the open round; it
#: could name others without end.
_MOST_GONE = 100


class ExecutorReports(RoundState):
    """The part of the round machine that takes what executors report."""

    def told(self, told: Told, now: float) -> None:
        stamp = told.stamp
        server = self.server is not None and told.sender == self.server.peer
        member = self.members.get(told.sender)
        if (stamp.job_id, stamp.generation) != (self.start.job_id, self.start.generation):
            self.counts["stale generation"] += 1
        elif told.kind == "aggregate" and server:
            self._server_told(told, now)
        elif told.kind == "train" and told.incarnation in self.failures.over:
            self.counts["stale incarnation"] += 1
            if isinstance(told.event, ExecutorExited):
                judged = self.failures.exited(told.incarnation, told.event)
                if judged is not None:
                    self.decide(judged)
        elif told.kind == "aggregate" or member is None:
            self.counts["uninvited"] += 1
        elif member.incarnation and told.incarnation != member.incarnation:
            self.counts["stale incarnation"] += 1
        else:
            member.incarnation = told.incarnation
            self.set_absent(member.peer, False)
            self._worker_told(member, told, now)

    def open_round(self, now: float, again: bool = False) -> None:
        """Everybody loaded takes part; who was not in the parameter server's broadcast is sent theta.

        ``again``: the same round, as no update counts; whose was refused begins it anew.
        """
        # the scheduler before this one may have closed it: what was applied comes
        self.phase = "training" if self.server_at != self.round + 1 else "closing"
        self.updates = RoundContributions(now)
        self.planner = Planner(self.rules.samples, self.rules.inner_steps, now)
        self.limits = {}
        for member in self.members.values():
            # of who has an update in the last round, and has not said in this generation that it is loaded,
            # too
            member.accepted = False
        for member in self.loaded:
            member.attempt = (member.attempt + member.left_out) if again else 0
            if member.peer in self.broadcast:
                member.enter(now)
            else:
                self.send_model(member, now)
        early, self.early = self.early, []
        # of a round that was closed already, what was said of it comes first
        for told in sorted(early, key=lambda told: isinstance(told.event, RoundApplied)):
            self.told(told, now)

    def _server_told(self, told: Told, now: float) -> None:
        event = told.event
        match event:
            case ModelReady():
                self._model_ready(event)
            case UpdateReceived():
                self._update_received(told, event, now)
            case UpdateRefused():
                self._update_refused(event)
            case RoundApplied():
                self._round_applied(told, event, now)
            case CheckpointSaved():
                self.saved = max(self.saved, event.round)
                self.decide(events.Checkpointed(event.round, event.place))
            case Exported() if self.phase == "exporting":
                self.phase = "done"
                self.decide(events.Publish(event.files))
            case ExecutorError(kind="checkpoint") if self.phase == "loading" and self.start.round:
                # no fault of its worker
                self.restart(event.message, unusable=True)
            case ExecutorError():
                self.failed(told.sender, "aggregate", event.message, event.kind)
            case ExecutorExited():
                self.failed(told.sender, "aggregate", exit_text(event), "exit")
            case _:
                self.counts["foreign event"] += 1

    def _model_ready(self, event: ModelReady) -> None:
        server = self.server
        if self.server_ready or server is None or self.phase != "loading":
            self.counts["stale round"] += 1
            return
        if event.round == self.round + 1 and self.start.taken_over and self.round == self.start.round:
            # the scheduler before this one had closed the round; RoundApplied says with what
            self.theta, self.server_at = self.start.theta, event.round
            return
        if event.round != self.round:
            text = f"the parameter server is at round {event.round}, not {self.round}"
            self.failed(server.peer, "aggregate", text, "internal")
            return
        if self.start.theta and event.theta != self.start.theta:
            text = f"the parameter server restored another theta than that of round {self.round}"
            self.failed(server.peer, "aggregate", text, "data")
            return
        for note in event.notes:
            logger.warning("The model: %s", note, extra={"job_id": self.start.job_id})
        self.theta, self.server_at = event.theta, event.round
        if self.round == 0:
            self.decide(events.FirstTheta(event.theta))
        self.early = [told for told in self.early if told.stamp.round <= self.round]
        if self.round >= self.rules.rounds:
            self._export()

    def _export(self) -> None:
        self.phase = "exporting"
        self.to_server(Export(to=self.scheduler))

    def _update_received(self, told: Told, event: UpdateReceived, now: float) -> None:
        if self.is_early(event.round):
            self.early = events.with_early(self.early, told)
            return
        if event.round != self.round or self.phase not in (*OPEN, "closing"):
            self.counts["stale round"] += 1
            return
        worker, accepted = event.worker, self.updates.accepted
        if worker not in self.members and len(accepted) >= len(self.members) + _MOST_GONE:
            self.counts["uninvited"] += 1
            return
        part = event.contribution
        problem = self.claim_problem(worker, part)
        if problem or part is None:
            self.counts["wrong contribution"] += 1
            text = f"the parameter server accepted an update that cannot be what it states: {problem}"
            self.failed(told.sender, "aggregate", text, "claims")
            return
        self.updates.accept(part)
        member = self.members.get(worker)
        if member is not None:
            member.overtake(self.round)
            member.accept(now)
            if member.early:
                self.updates.departed.add(member.peer)
        for one in self.early:
            # the round was reported as applied before the last of its updates was
            if isinstance(one.event, RoundApplied) and one.event.round == self.round:
                self.early = [other for other in self.early if other is not one]
                self._round_applied(one, one.event, now)
                return

    def _update_refused(self, event: UpdateRefused) -> None:
        code = event.code if event.code in REFUSALS else "another code"
        self.counts[f"update refused: {code}"] += 1
        member = self.members.get(event.worker)
        # of a stale one, what was applied tells the rest: it may be a second copy of one that counts
        settled = event.code in ("duplicate", "stale")
        if member is None or event.round != self.round or settled or member.accepted:
            return
        text = "An update was refused (%s): %s; its worker starts over"
        self.log(logging.WARNING, member.peer, text, event.code, event.reason)
        member.refused += 1
        if member.refused >= PATIENCE:
            self.failed(member.peer, "train", f"its updates are refused: {event.reason}", event.code)
        else:
            self.leave_out(member)

    def _round_applied(self, told: Told, event: RoundApplied, now: float) -> None:
        early = self.start.taken_over and self.is_early(event.round)
        if not early and (event.round != self.round or self.phase not in (*OPEN, "closing")):
            self.counts["stale round"] += 1
            return
        if early or not self.updates.accepted.keys() >= set(event.contributors):
            # it overtook the report of an update, without which the ledger would lack what is in the mean
            self.early = events.with_early(self.early, told)
            return
        entry = self.updates.entry(event, self.start.generation, now)
        for part in entry.contributors:
            foreign = self.tracker.finish(part.worker, part.finished)
            self.counts["foreign slices"] += len(foreign)
            self.count_steps(part)
            if part.worker in self.members:
                self.members[part.worker].total_samples += part.samples
        for worker in self.updates.accepted.keys() - set(event.contributors):
            self.tracker.give_back(worker, self.updates.finished(worker))
        begun = len(self.decided)
        for member in list(self.participants):
            if member.peer not in event.contributors:
                member.stalled += member.overdue
                self.leave_out(member)
                hopeless = member.missed >= PATIENCE or member.stalled >= STALLED
                if not member.absent and hopeless and self.round + 1 < self.rules.rounds:
                    text = f"left out of {member.missed} rounds in a row"
                    if member.stalled >= STALLED:
                        text = f"it began {member.stalled} rounds in a row, and sent no update in time"
                    self.drop(member.peer, "train", text)
        self.failures.applied(event.contributors)
        self.round, self.theta = self.round + 1, event.theta
        # the ledger has them with the round
        self.kept = self.tracker.version
        # the record is to hold what those who are dropped give back, and comes before that they are
        self.decided.insert(begun, events.Record(entry, self.tracker.to_state(), self.steps))
        if self.round >= self.rules.rounds:
            self._export()
        else:
            self.broadcast |= self.holders()
            self.open_round(now)

    def _worker_told(self, member: Member, told: Told, now: float) -> None:
        event = told.event
        match event:
            case Loaded():
                self._worker_loaded(member, now)
            case RoundStarted():
                self._round_started(member, told, event, now)
            case UpdateSent():
                # the parameter server reports it when it has added it
                pass
            case ExecutorError() | ExecutorExited():
                # the others do its part from now on, whatever becomes of it
                others = [one for one in self.members if one != member.peer]
                if self.phase == "exporting":
                    pass  # nobody needs it any more
                elif member.leaves is not None:
                    text = "its worker leaves, and its executor has ended"
                    self.decide(events.LetGo(member.peer, "train", text))
                elif judged := self.failures.failed(member.peer, told.incarnation, event, now, others):
                    self.decide(judged)
                self.lose(member.peer, "train", "its executor failed")
            case _:
                self.counts["foreign event"] += 1

    def _worker_loaded(self, member: Member, now: float) -> None:
        if member.loaded:
            return
        member.loaded, member.load_s = True, now - member.joined_at
        if self.phase in (*OPEN, "closing"):
            self.tell_members()
            # past Training, or if an earlier generation's update is in, it gets the next theta with everybody
            # else
            if self.phase == "training" and member.peer not in self.updates.accepted:
                self.send_model(member, now)

    def _round_started(self, member: Member, told: Told, event: RoundStarted, now: float) -> None:
        if self.is_early(event.round):
            self.early = events.with_early(self.early, told)
        elif event.round != self.round or not member.in_round:
            self.counts["stale round"] += 1
        elif event.attempt < member.attempt:
            self.counts["stale attempt"] += 1
        elif event.theta != self.theta and self.theta:
            self.counts["wrong theta"] += 1
            text = "A worker started round %d from another theta; it is sent the right one"
            self.log(logging.ERROR, member.peer, text, self.round)
            self.send_model(member, now)
        elif not member.fixed and not (member.started == self.round and member.batches):
            size = member.batch_size if event.batch_size is None else event.batch_size
            if size != member.batch_size and not 0 < size <= (self.rules.most_batch_size or 0):
                self._impossible(member, f"its batches have {size} samples")
                return
            # a higher one is from an earlier generation
            member.attempt = event.attempt
            if size != member.batch_size:
                member.resize(size)
            member.start(self.round, now)
            self.planner.upset()

    def progress_reported(self, event: events.Reported, now: float) -> None:
        member, stamp, report = self.members.get(event.sender), event.stamp, event.progress
        if member is None or stamp.job_id != self.start.job_id:
            self.counts["uninvited"] += 1
        elif stamp.generation != self.start.generation or member.incarnation != event.incarnation:
            self.counts["stale generation"] += 1
        elif report.round != self.round or member.started != self.round or not member.in_round:
            self.counts["stale round"] += 1
        elif report.attempt != member.attempt:
            self.counts["stale attempt"] += 1
        elif not (taken := member.progress(report, now, self.may_use(member), self.open_before)):
            self.counts["old or impossible counts"] += 1
            if taken is None and not member.left_out:
                text = f"{report.samples} samples in {report.batches} batches of round {self.round}"
                self._impossible(member, f"it reports {text}")

    def _impossible(self, member: Member, what: str) -> None:
        """What a worker says of itself cannot be; who goes on like that is replaced."""
        member.impossible += 1
        text = "A worker states what cannot be (%s); it is not believed"
        self.log(logging.WARNING, member.peer, text, what)
        if member.impossible >= PATIENCE:
            self.failed(member.peer, "train", f"it states what cannot be: {what}", "claims")
