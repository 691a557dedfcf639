"""The round machine: the only authority on which round it is, who takes part and when it is applied.

Training -> Scheduled -> Updating -> Closing -> the next round; nothing but the parameter server's
``RoundApplied`` advances the round. Workers may come, go, hang, repeat and reorder themselves at any
moment. Pure: :meth:`RoundMachine.handle` takes an event and the monotonic time and returns actions.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import Literal

from hypha.journal import Journal
from hypha.messages import (
    CheckpointSaved,
    CloseRound,
    Contribution,
    Directive,
    ExecutorClass,
    ExecutorError,
    ExecutorExited,
    Export,
    Exported,
    Loaded,
    Members,
    ModelReady,
    NextSlice,
    PeerRef,
    Plan,
    RoundApplied,
    RoundStarted,
    SendModel,
    UpdateReceived,
    UpdateRefused,
    UpdateSent,
)
from hypha.messages import Event as ExecutorEvent
from hypha.scheduler.books import Books
from hypha.scheduler.closing import PATIENCE, given_up, may_close
from hypha.scheduler.events import (
    Action,
    Checkpointed,
    Drop,
    Fail,
    Input,
    Joined,
    LifeBegan,
    Lost,
    Publish,
    Reachable,
    Record,
    Reported,
    Restart,
    Send,
    Tick,
    Told,
    Unreachable,
)
from hypha.scheduler.failing import Failing, exit_text
from hypha.scheduler.members import Member
from hypha.scheduler.planning import Planner
from hypha.scheduler.rules import Failures, Rules, Start
from hypha.scheduler.slices import Assignment, SliceTracker

logger = logging.getLogger("hypha.scheduler")

#: of the entries in a journal
NAME = "rounds"

Phase = Literal["loading", "training", "scheduled", "updating", "closing", "exporting", "done", "failed"]
_OPEN = ("training", "scheduled", "updating")

#: theta is sent again when nobody said RoundStarted; doubled each time
_RESEND_S = 10.0


class RoundMachine:
    """One life (generation) of a job. ``counts`` counts what was ignored or refused, by reason."""

    def __init__(
        self,
        rules: Rules,
        start: Start,
        tracker: SliceTracker,
        scheduler: PeerRef,
        failures: Failures,
        journal: Journal | None = None,
    ) -> None:
        self.rules = rules
        self.start = start
        self.tracker = tracker
        self.scheduler = scheduler
        self.failures = failures
        self.failing = Failing(failures, rules.executor_restarts)
        self.round = start.round
        self.steps = start.steps
        self.phase: Phase = "loading"
        self.theta = ""
        self.server: PeerRef | None = None
        self.server_ready = False
        self.members: dict[str, Member] = {}
        self.counts: Counter[str] = Counter()
        self.books = Books()
        #: nobody serves the dataset right now: no deadline runs
        self.starved = False
        self._planner = Planner(rules.samples, rules.inner_steps)
        self._broadcast: frozenset[str] = frozenset()
        #: what was said before its round was opened here
        self._early: list[Told] = []
        self._enough_since: float | None = None
        self._journal = journal
        if journal is not None:
            began = LifeBegan(rules, start, tracker.to_state(), scheduler)
            journal.note(NAME, 0.0, began, (), self._summary())

    @property
    def loaded(self) -> list[Member]:
        """Workers that have a model."""
        return [member for member in self.members.values() if member.loaded]

    @property
    def present(self) -> list[Member]:
        """Workers that have a model and can be reached."""
        return [member for member in self.loaded if not member.absent]

    @property
    def participants(self) -> list[Member]:
        """Workers whose update of the open round is hoped for or here."""
        return [member for member in self.loaded if member.in_round and not member.left_out]

    @property
    def paused(self) -> bool:
        """The open round is kept, but not closed: there are too few workers."""
        return self.phase in _OPEN and len(self.present) < self.rules.min_workers

    def handle(self, event: Input, now: float) -> list[Action]:
        """What is to be done about ``event``; never raises for what a peer said."""
        actions = self._apply(event, now)
        if self._journal is not None:
            self._journal.note(NAME, now, event, actions, self._summary())
        return actions

    def _summary(self) -> dict[str, object]:
        """Of its state, for the journal."""
        return {
            "phase": self.phase,
            "round": self.round,
            "generation": self.start.generation,
            "members": len(self.members),
            "accepted": len(self.books.accepted),
            "server_ready": self.server_ready,
            "steps": self.steps,
        }

    def _apply(self, event: Input, now: float) -> list[Action]:
        if self.phase in ("done", "failed"):
            return []
        actions: list[Action] = []
        match event:
            case Joined():
                self._joined(event)
            case Lost():
                if event.kind == "train":
                    self.failing.forget(event.peer)
                actions = self._lost(event.peer, event.kind, event.reason)
            case Unreachable(peer=peer, kind="train"):
                self._set_absent(peer, True)
            case Reachable(peer=peer, kind="train"):
                self._set_absent(peer, False)
            case Unreachable() | Reachable():
                pass
            case Reported():
                self._progress(event, now)
            case Told():
                actions = self._told(event, now)
            case Tick():
                pass
        return actions + self._advance(now)

    def next_slice(self, caller: str, request: NextSlice) -> Assignment | str:
        """The slice for a member's question, or why there is none right now."""
        member = self.members.get(caller)
        stamp = request.stamp
        if member is None or (stamp.job_id, stamp.generation) != (self.start.job_id, self.start.generation):
            self.counts["uninvited"] += 1
            return "you take no part in this life of the job"
        if member.incarnation and request.incarnation != member.incarnation:
            self.counts["stale incarnation"] += 1
            return "another process of yours takes part in the job"
        behind = member.started < self.round and stamp.round < self.round
        before = stamp.round == self.round and stamp.attempt < member.attempt
        if member.left_out or before or (member.missed and behind):
            return "your update was left out: wait for theta, then ask again"
        if stamp.round > self.round and caller not in self.books.accepted:
            # it trains in the next round already; should its update turn out to be left out of this one, all
            # that it was given until then is taken back
            return "the round that you are in has not begun here yet: ask again"
        if request.held_from:
            sent = self.books.contributions.get(caller) if caller in self.books.accepted else None
            keep = sent.finished if sent is not None else ()
            self.tracker.dropped(caller, request.incarnation, request.held_from, keep)
        return self.tracker.next(caller, request.incarnation, request.seq, request.cached)

    # --- who is here ----------------------------------------------------------------------------------

    def _joined(self, event: Joined) -> None:
        if event.kind == "aggregate":
            self.server, self.server_ready = event.ref, False
        elif event.ref.peer not in self.members:
            self.members[event.ref.peer] = Member(event.ref, event.batch_size, self.rules.multiple)

    def _lost(self, peer: str, kind: ExecutorClass, reason: str) -> list[Action]:
        if kind == "aggregate":
            if self.server is None or self.server.peer != peer:
                return []
            self.server, self.server_ready = None, False
            return [Restart(reason)]
        sent = self.books.contributions.get(peer) if peer in self.books.accepted else None
        # it may hold slices of an earlier life
        self.tracker.forget(peer, keep=sent.finished if sent is not None else ())
        member = self.members.pop(peer, None)
        if member is None:
            return []
        if member.incarnation:
            self.failing.over(member.incarnation)
        self._planner.upset()
        return self._tell_members() if member.loaded else []

    def _set_absent(self, peer: str, absent: bool) -> None:
        """The others share its part of the open round while it is away."""
        member = self.members.get(peer)
        if member is not None and member.absent != absent:
            member.absent = absent
            self._planner.upset()

    def _failed(self, peer: str, kind: ExecutorClass, message: str, cause: str) -> list[Action]:
        """Release it, replace it; give the job up when that happened too often."""
        error = self.failures.add(peer, kind, message, cause)
        if error is not None:
            self.phase = "failed"
            return [Fail(error)]
        return [Drop(peer, kind, message), *self._lost(peer, kind, message)]

    def _judged(self, actions: list[Action]) -> list[Action]:
        """Of an executor that failed."""
        if any(isinstance(action, Fail) for action in actions):
            self.phase = "failed"
        return actions

    def _told(self, told: Told, now: float) -> list[Action]:
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
                return self._judged(self.failing.exited(told.incarnation, told.event))
        elif told.kind == "aggregate" or member is None:
            self.counts["uninvited"] += 1
        elif member.incarnation and told.incarnation != member.incarnation:
            self.counts["stale incarnation"] += 1
        else:
            member.incarnation = told.incarnation
            self._set_absent(member.peer, False)
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
                return self._update_sent(member, told, event.contribution)
            case ExecutorError() | ExecutorExited():
                # the others do its part from now on, whatever becomes of it
                gone = self._lost(member.peer, "train", "its executor failed")
                if self.phase == "exporting":
                    return gone  # nobody needs it any more
                failed = self.failing.failed(member.peer, told.incarnation, event, now)
                return [*self._judged(failed), *gone]
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
            case RoundApplied() if self.start.taken_over and self._is_early(event.round):
                self._early.append(told)
                return []
            case RoundApplied():
                return self._round_applied(event, now)
            case CheckpointSaved():
                return [Checkpointed(event.round, event.place)]
            case Exported() if self.phase == "exporting":
                self.phase = "done"
                return [Publish(event.files)]
            case ExecutorError(kind="checkpoint") if self.phase == "loading" and self.start.round:
                # no fault of its worker
                self.server, self.server_ready = None, False
                return [Restart(event.message, unusable=True)]
            case ExecutorError():
                return self._failed(told.sender, "aggregate", event.message, event.kind)
            case ExecutorExited():
                return self._failed(told.sender, "aggregate", exit_text(event), "exit")
            case _:
                self.counts["foreign event"] += 1
                return []

    # --- what workers say -----------------------------------------------------------------------------

    def _worker_loaded(self, member: Member, now: float) -> list[Action]:
        if member.loaded:
            return []
        member.loaded = True
        if self.phase not in (*_OPEN, "closing"):
            return []
        # past Training, or if an earlier life's update is in, it gets the next theta with everybody else
        now_or_next = self.phase == "training" and member.peer not in self.books.accepted
        join = self._send_model(member, now) if now_or_next else []
        return [*self._tell_members(), *join]

    def _round_started(self, member: Member, told: Told, event: RoundStarted, now: float) -> list[Action]:
        if self._is_early(event.round):
            self._early.append(told)
        elif event.round != self.round or not member.in_round:
            self.counts["stale round"] += 1
        elif event.attempt < member.attempt:
            self.counts["stale attempt"] += 1
        elif event.theta != self.theta:
            self.counts["wrong theta"] += 1
            logger.error(
                "A worker started round %d from another theta; it is sent the right one",
                self.round,
                extra={"peer_id": member.peer, "job_id": self.start.job_id},
            )
            return self._send_model(member, now)
        elif not member.fixed and not (member.started == self.round and member.batches):
            # a higher one is from an earlier life
            member.attempt = event.attempt
            member.start(self.round, now)
            self._planner.upset()
        return []

    def _is_early(self, round_: int) -> bool:
        """Is what was said of ``round_`` to be taken up when that is opened here? While a round is closing
        the next one begins elsewhere. A life that goes on with another's executors hears of its first round
        before it has opened it, and of the next one if the parameter server had closed the first.
        """
        if round_ == self.round:
            return self.phase == "loading"
        first = self.phase == "loading" or self.round == self.start.round
        return round_ == self.round + 1 and (self.phase == "closing" or (first and self.start.taken_over))

    def _progress(self, event: Reported, now: float) -> None:
        member, stamp, report = self.members.get(event.sender), event.stamp, event.progress
        if member is None or stamp.job_id != self.start.job_id:
            self.counts["uninvited"] += 1
        elif stamp.generation != self.start.generation or member.incarnation != event.incarnation:
            self.counts["stale generation"] += 1
        elif report.round != self.round or member.started != self.round or not member.in_round:
            self.counts["stale round"] += 1
        elif report.attempt != member.attempt:
            self.counts["stale attempt"] += 1
        elif not member.progress(report, now):
            self.counts["old or impossible counts"] += 1

    def _update_sent(self, member: Member, told: Told, part: Contribution) -> list[Action]:
        possible = 0 < part.samples <= part.batches * member.batch_size
        if part.worker != member.peer or part.incarnation != member.incarnation or not possible:
            self.counts["wrong contribution"] += 1
        elif self._is_early(part.round):
            self._early.append(told)
        elif part.round == self.round and part.attempt < member.attempt:
            self.counts["stale attempt"] += 1
        elif part.round == self.round and member.in_round and not member.left_out:
            member.sent = self.books.note(part)
            member.overtake(self.round)
        else:
            entry = self.books.late(part)
            if entry is None:
                self.counts["stale round"] += 1
                return []
            self.tracker.finish(part.worker, part.finished)
            self._count_steps(part)
            return [Record(entry, None, self.steps)]
        return []

    def _count_steps(self, part: Contribution) -> None:
        self.steps = max(self.steps, part.steps + math.ceil(part.batches / self.rules.multiple))

    # --- what the parameter server says -----------------------------------------------------------------

    def _model_ready(self, event: ModelReady) -> list[Action]:
        server = self.server
        if self.server_ready or server is None or self.phase != "loading":
            self.counts["stale round"] += 1
            return []
        if event.round == self.round + 1 and self.start.taken_over and self.round == self.start.round:
            # the scheduler before this one had closed the round; RoundApplied says with what
            self.server_ready, self.theta = True, self.start.theta
            return []
        if event.round != self.round:
            text = f"the parameter server is at round {event.round}, not {self.round}"
            return self._failed(server.peer, "aggregate", text, "internal")
        if self.start.theta and event.theta != self.start.theta:
            text = f"the parameter server restored another theta than that of round {self.round}"
            return self._failed(server.peer, "aggregate", text, "data")
        self.server_ready, self.theta = True, event.theta
        if self.round >= self.rules.rounds:
            self.phase = "exporting"
            return self._to_server(Export(to=self.scheduler))
        return []

    def _update_received(self, told: Told, event: UpdateReceived, now: float) -> list[Action]:
        if self._is_early(event.round):
            self._early.append(told)
            return []
        if event.round != self.round or self.phase not in (*_OPEN, "closing"):
            self.counts["stale round"] += 1
            return []
        self.books.accepted.setdefault(event.worker, event.samples)
        if event.contribution is not None and event.contribution.worker == event.worker:
            # its worker may be gone before it says so itself
            self.books.note(event.contribution)
        member = self.members.get(event.worker)
        if member is not None:
            member.overtake(self.round)
            member.accept(now)
        return []

    def _update_refused(self, event: UpdateRefused) -> list[Action]:
        self.counts[f"update refused: {event.code}"] += 1
        member = self.members.get(event.worker)
        # of a stale one, what was applied tells the rest: it may be a second copy of one that counts
        settled = event.code in ("duplicate", "stale")
        if member is None or event.round != self.round or settled or member.accepted:
            return []
        logger.warning(
            "The parameter server refused an update (%s): %s; its worker starts over",
            event.code,
            event.reason,
            extra={"peer_id": event.worker, "job_id": self.start.job_id},
        )
        member.refused += 1
        if member.refused >= PATIENCE:
            return self._failed(member.peer, "train", f"its updates are refused: {event.reason}", event.code)
        self._leave_out(member)
        return []

    def _round_applied(self, event: RoundApplied, now: float) -> list[Action]:
        if event.round != self.round or self.phase not in (*_OPEN, "closing"):
            self.counts["stale round"] += 1
            return []
        for part in event.contributions:
            if part.worker in event.contributors and part.round == event.round:
                self.books.note(part)
        entry = self.books.apply(event, self.start.generation, now)
        for part in entry.contributors:
            foreign = self.tracker.finish(part.worker, part.finished)
            self.counts["foreign slices"] += len(foreign)
            self._count_steps(part)
        for worker, part in self.books.contributions.items():
            if worker not in event.contributors:
                self.tracker.give_back(worker, part.finished)
                self.counts["lost samples"] += part.samples
        drops: list[Action] = []
        for member in list(self.participants):
            if member.peer not in event.contributors:
                self._leave_out(member)
                if not member.absent and member.missed >= PATIENCE and self.round + 1 < self.rules.rounds:
                    text = f"left out of {member.missed} rounds in a row"
                    drops += [Drop(member.peer, "train", text), *self._lost(member.peer, "train", text)]
            elif member.sent is not None:
                member.total_samples += member.sent.samples
        self.failures.applied(event.contributors)
        self.round, self.theta = self.round + 1, event.theta
        actions: list[Action] = [Record(entry, self.tracker.to_state(), self.steps), *drops]
        if self.round >= self.rules.rounds:
            self.phase = "exporting"
            return [*actions, *self._to_server(Export(to=self.scheduler))]
        self._broadcast |= self._holders()
        return actions + self._open_round(now)

    # --- rounds ---------------------------------------------------------------------------------------

    def _open_round(self, now: float, again: bool = False) -> list[Action]:
        """Everybody loaded takes part; who was not in the parameter server's broadcast is sent theta.

        ``again``: the same round, as no update counts; whose was refused begins it anew.
        """
        self.phase = "training"
        self.books.open_round(now)
        self._planner.open_round(now)
        actions: list[Action] = []
        for member in self.loaded:
            member.attempt = (member.attempt + member.left_out) if again else 0
            if member.peer in self._broadcast:
                member.enter(now, max(_RESEND_S, 3.0 * (member.theta_s or 0.0)))
            else:
                actions += self._send_model(member, now)
        early, self._early = self._early, []
        # of a round that was closed already, what was said of it comes first
        for told in sorted(early, key=lambda told: isinstance(told.event, RoundApplied)):
            actions += self._told(told, now)
        return actions

    def _holders(self) -> frozenset[str]:
        """Who has said that it runs on theta of the round that is about to be opened, or of the next one."""
        return frozenset(
            told.sender
            for told in self._early
            if isinstance(told.event, RoundStarted)
            and (told.event.round > self.round or told.event.theta == self.theta)
        )

    def _leave_out(self, member: Member) -> None:
        """Its part of the open round does not count; it starts over from the next theta it is sent."""
        member.left_out = True
        # of who cannot be reached its lease decides, not how short rounds are
        member.missed = max(member.missed, 1) if member.absent else member.missed + 1
        member.sent = None
        self.books.contributions.pop(member.peer, None)
        self.tracker.lose(member.peer)
        self._planner.upset()

    def _advance(self, now: float) -> list[Action]:
        """What time, or the sum of what was said, asks for."""
        if self.phase in ("exporting", "done", "failed"):
            return []
        actions = self._judged(self.failing.advance(now))
        if self.phase == "loading" and self._may_begin(now):
            self._broadcast = self._holders()
            actions += [*self._tell_members(), *self._open_round(now)]
        if self.phase in _OPEN and not self.participants and not self.books.accepted and self.loaded:
            self._broadcast = frozenset()
            actions += self._open_round(now, again=True)
        if self.phase in _OPEN:
            actions += self._plan(now)
            actions += self._resend(now)
            actions += self._close(now)
        return actions

    def _may_begin(self, now: float) -> bool:
        """With all workers that are wanted; with fewer only when the others do not come soon. A round that an
        earlier life has begun is open in any case.
        """
        if len(self.present) < self.rules.min_workers:
            self._enough_since = None
            return False
        self._enough_since = now if self._enough_since is None else self._enough_since
        everybody = len(self.present) >= self.rules.workers or self.start.taken_over
        return self.server_ready and (everybody or now >= self._enough_since + self.rules.start_grace_s)

    def _plan(self, now: float) -> list[Action]:
        accepted = self.books.accepted
        members = [one for one in self.participants if not (one.accepted or one.absent)]
        changed = self._planner.plan(members, sum(accepted.values()), self.round, now, close=bool(accepted))
        actions: list[Action] = []
        for peer, batches in changed.items():
            member = self.members[peer]
            member.set_plan(batches, now)
            actions.append(Send(member.ref, "train", Plan(round=self.round, batches=batches)))
        if self.phase == "training" and (self._planner.final or accepted):
            self.phase = "scheduled"
        if self.phase == "scheduled" and accepted:
            self.phase = "updating"
        return actions

    def _resend(self, now: float) -> list[Action]:
        """A theta that did not arrive is sent again, ever more seldom."""
        actions: list[Action] = []
        for member in self.participants:
            if member.started < self.round and now >= member.resend_at:
                member.resend_after_s *= 2.0
                member.resend_at = now + member.resend_after_s
                actions += self._to_server(SendModel(to=member.ref, attempt=member.attempt))
        return actions

    def _close(self, now: float) -> list[Action]:
        books, rules = self.books, self.rules
        if not books.accepted:
            actions: list[Action] = []
            for member in [] if self.starved else given_up(self.participants, rules, self.round, now):
                if self.phase in _OPEN:
                    text = "its update did not come, and nobody else's did"
                    actions += self._failed(member.peer, "train", text, "overdue")
            return actions
        if self.paused or not self.loaded:
            books.quorum_since = books.complete_since = None
            return []
        if not may_close(books, self.participants, rules, self.round, now, self.starved):
            return []
        self.phase = "closing"
        self._broadcast = frozenset(member.peer for member in self.loaded)
        final = self.round + 1 >= rules.rounds
        checkpoint = final or (self.round + 1) % rules.checkpoint_every == 0
        return self._to_server(CloseRound(round=self.round, final=final, checkpoint=checkpoint))

    def _send_model(self, member: Member, now: float) -> list[Action]:
        member.enter(now, max(_RESEND_S, 3.0 * (member.theta_s or 0.0)))
        self._planner.upset()
        return self._to_server(SendModel(to=member.ref, attempt=member.attempt))

    def _tell_members(self) -> list[Action]:
        if not self.server_ready:
            return []
        return self._to_server(Members(peers=tuple(member.ref for member in self.loaded)))

    def _to_server(self, directive: Directive) -> list[Action]:
        return [Send(self.server, "aggregate", directive)] if self.server is not None else []
