"""What the parameter server reports to the round machine: updates that are in, rounds that are applied."""

from __future__ import annotations

import logging

from hypha.errors import REFUSALS
from hypha.messages import (
    CheckpointSaved,
    ExecutorError,
    ExecutorExited,
    Export,
    Exported,
    ModelReady,
    RoundApplied,
    UpdateReceived,
    UpdateRefused,
)
from hypha.messages import Event as ExecutorEvent
from hypha.scheduler.rounds.closing import PATIENCE, STALLED
from hypha.scheduler.rounds.events import (
    Action,
    Checkpointed,
    Drop,
    Publish,
    Record,
    Told,
    with_early,
)
from hypha.scheduler.rounds.failures import exit_text
from hypha.scheduler.rounds.participants import Member
from hypha.scheduler.rounds.phases import Phases
from hypha.scheduler.rounds.state import OPEN

logger = logging.getLogger(__name__)

#: Workers that may be gone by the time that the parameter server has their updates of the open round; it
#: could name others without end.
_MOST_GONE = 100


class ServerReports(Phases):
    """The part of the round machine that takes what the parameter server reports."""

    def server_told(self, told: Told, now: float) -> list[Action]:
        """What follows from an event of the parameter server."""
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
                return self._round_applied(told, event, now)
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
        return self._applied_before(now)

    def _applied_before(self, now: float) -> list[Action]:
        """What follows when the round was reported as applied before the last of its updates was."""
        for told in self.early:
            if isinstance(told.event, RoundApplied) and told.event.round == self.round:
                self.early = [one for one in self.early if one is not told]
                return self._round_applied(told, told.event, now)
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

    def _round_applied(self, told: Told, event: RoundApplied, now: float) -> list[Action]:
        if event.round != self.round or self.phase not in (*OPEN, "closing"):
            self.counts["stale round"] += 1
            return []
        for part in event.contributions:
            # of a parameter server of an earlier version, to a scheduler that takes over
            if problem := self.claim_problem(part.worker, part):
                text = f"the parameter server applied an update that cannot be what it states: {problem}"
                return self.failed(told.sender, "aggregate", text, "claims")
            self.updates.accept(part)
        if not self.updates.accepted.keys() >= set(event.contributors):
            # it overtook the report of an update, without which the ledger would lack what is in the mean
            self.early = with_early(self.early, told)
            return []
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
