"""What training executors report to the round machine: what they begin, how far they are, that they end."""

from __future__ import annotations

import logging

from hypha.messages import Event as ExecutorEvent
from hypha.messages import ExecutorError, ExecutorExited, Loaded, Progress, RoundStarted, UpdateSent
from hypha.scheduler.rounds.closing import PATIENCE
from hypha.scheduler.rounds.events import Action, LetGo, Reported, Told, with_early
from hypha.scheduler.rounds.participants import Member
from hypha.scheduler.rounds.phases import Phases
from hypha.scheduler.rounds.state import OPEN

logger = logging.getLogger(__name__)


class WorkerReports(Phases):
    """The part of the round machine that takes what training executors report."""

    def worker_told(self, member: Member, told: Told, now: float) -> list[Action]:
        """What follows from an event of the executor of ``member``."""
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
        elif event.theta != self.theta and self.theta:
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

    def progress_reported(self, event: Reported, now: float) -> list[Action]:
        """What follows from how far an executor says that it is."""
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
