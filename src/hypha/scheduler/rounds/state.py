"""What the round machine knows, and the smallest steps that change it: who takes part, whose update counts.

:class:`RoundState` is the part of :class:`hypha.scheduler.rounds.machine.RoundMachine` that the other parts
stand on.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import Literal

from hypha.messages import Contribution, Directive, ExecutorClass, Members, PeerRef, RoundStarted, SendModel
from hypha.rules.contributions import contribution_problem
from hypha.scheduler.data.slices import Assignment, SliceTracker
from hypha.scheduler.rounds import events
from hypha.scheduler.rounds.closing import RoundContributions
from hypha.scheduler.rounds.events import Action, Told
from hypha.scheduler.rounds.failures import Failures
from hypha.scheduler.rounds.participants import Leave, Member
from hypha.scheduler.rounds.planning import Planner
from hypha.scheduler.rounds.policy import CarriedOver, Rules, Start

logger = logging.getLogger(__name__)

Phase = Literal["loading", "training", "scheduled", "updating", "closing", "exporting", "done", "failed"]
#: phases in which a round is open
OPEN = ("training", "scheduled", "updating")

#: a worker that was refused slices so often, as it holds enough, is named; half of it is forgotten with each
#: round. An honest one asks for one at a time, and holds less
_HOARDING = 10
#: slices that a worker fetches before they are needed, however short they are
_MOST_AHEAD = 32
#: what is kept of a notice for an outer step and a checkpoint
_OUTER_STEP_S = 1.0


class RoundState:
    """One generation of a job. ``counts`` counts what was ignored or refused, by reason. Whatever handles an
    event adds what it decides to ``decided``.
    """

    def __init__(
        self, rules: Rules, start: Start, tracker: SliceTracker, scheduler: PeerRef, carried: CarriedOver
    ) -> None:
        self.rules = rules
        self.start = start
        self.decided: list[Action] = []
        self.tracker = tracker
        self.scheduler = scheduler
        self.failures = Failures(rules.max_failures, rules.executor_restarts, carried)
        self.round = start.round
        self.steps = start.steps
        self.phase: Phase = "loading"
        #: this generation is at its end: another one begins
        self.over = False
        #: of the open round; empty where nobody says it, as the round was closed in an earlier generation
        self.theta = ""
        self.server: PeerRef | None = None
        #: at which round the parameter server was when it had the model; None before
        self.server_at: int | None = None
        #: when its worker ends; the newest round as which it was asked to save itself, and has
        self.server_leaves: Leave | None = None
        self.saving = self.saved = -1
        self.members: dict[str, Member] = {}
        self.counts: Counter[str] = Counter()
        self.updates = RoundContributions()
        #: whether any data node serves the dataset
        self.served = True
        #: as was said last
        self.leases: events.LeasesHeld | None = None
        self.short_since = carried.short_since
        #: whose executors had it in the generation before; those of others may load it for as long as it
        #: takes
        self.had_model = frozenset(carried.had_model)
        self.planner = Planner(rules.samples, rules.inner_steps, 0.0)
        self.broadcast: frozenset[str] = frozenset()
        #: what was said before its round was opened here
        self.early: list[Told] = []
        self.enough_since: float | None = None
        #: for how many samples updates of the open round may stand, as the parameter server was told
        self.limits: dict[str, int] = {}
        #: the newest version of the slices' state that is to be made durable
        self.kept = -1

    @property
    def server_ready(self) -> bool:
        """The parameter server has the model."""
        return self.server_at is not None

    @property
    def loaded(self) -> list[Member]:
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
        return self.phase in OPEN and len(self.present) < self.rules.min_workers

    @property
    def hurried(self) -> Leave | None:
        """By when the open round is to be over, as its parameter server ends, and with it the update of a
        worker that ends, too: nobody could send that again. None where there is no such haste.
        """
        leaves = self.server_leaves
        if leaves is None or not (self.updates.departed or any(one.leaves for one in self.participants)):
            return None
        # the outer step takes about as long as a synchronisation, and the new theta is to be saved
        spent_s = min(_OUTER_STEP_S, (leaves.at - leaves.since) / 4.0)
        return Leave(leaves.at - spent_s, leaves.since)

    def join(self, event: events.Joined, now: float) -> None:
        """An executor was started."""
        if event.kind == "aggregate":
            self.server, self.server_at, self.server_leaves = event.ref, None, None
        elif event.ref.peer not in self.members:
            self.members[event.ref.peer] = Member(event.ref, event.batch_size, self.rules.multiple, now)
        else:
            # another executor was started there: how long it loads, nobody knows
            self.members[event.ref.peer].told_at = None
            self.members[event.ref.peer].joined_at = now

    def lose(self, peer: str, kind: ExecutorClass, reason: str) -> None:
        """An executor takes part no more."""
        if kind == "aggregate":
            if self.server is not None and self.server.peer == peer:
                self.restart(reason)
            return
        # it may hold slices of an earlier generation
        self.tracker.forget(peer, keep=self.updates.finished(peer))
        member = self.members.pop(peer, None)
        if member is None:
            return
        if member.incarnation:
            self.failures.over.add(member.incarnation)
        self.planner.upset()
        if member.loaded:
            self.tell_members()

    def leaves(self, event: events.ParticipantLeaves, now: float) -> None:
        """Its worker ends soon: what it has trained by then is to count, and the others share the rest."""
        server = self.server is not None and self.server.peer == event.peer
        member = self.members.get(event.peer)
        if event.kind == "aggregate" and server:
            known = self.server_leaves
            self.server_leaves = Leave(now + event.left_s, now if known is None else known.since)
        elif event.kind == "train" and member is not None:
            if member.leaves is None:
                self.planner.upset()
            since = now if member.leaves is None else member.leaves.since
            member.leaves = Leave(now + event.left_s, since)

    def let_go(self, peer: str, kind: ExecutorClass) -> None:
        """It ends soon, and nothing more can come of it."""
        reason = "its worker leaves"
        self.decide(events.LetGo(peer, kind, reason))
        self.lose(peer, kind, reason)

    def set_absent(self, peer: str, absent: bool) -> None:
        """The others share its part of the open round while it is away."""
        member = self.members.get(peer)
        if member is not None and member.absent != absent:
            member.absent = absent
            self.planner.upset()

    def leave_out(self, member: Member) -> None:
        """Its part of the open round does not count; it starts over from the next theta it is sent."""
        member.left_out = True
        # of who cannot be reached its lease decides, not how short rounds are
        member.missed = max(member.missed, 1) if member.absent else member.missed + 1
        self.counts["lost samples"] += member.samples
        self.tracker.lose(member.peer)
        self.planner.upset()

    def decide(self, action: Action) -> None:
        """What ends the job is the machine's end, too."""
        if isinstance(action, events.Fail):
            self.phase = "failed"
        self.decided.append(action)

    def failed(self, peer: str, kind: ExecutorClass, message: str, cause: str) -> None:
        """Release it, replace it; give the job up when that happened too often."""
        # of parameter servers there is one at a time, perhaps on the same machine again
        others = [] if kind == "aggregate" else [one for one in self.members if one != peer]
        error = self.failures.add(peer, message, cause, others)
        if error is not None:
            self.decide(events.Fail(error))
        else:
            self.drop(peer, kind, message)

    def drop(self, peer: str, kind: ExecutorClass, reason: str) -> None:
        """Release it, and replace it."""
        self.decide(events.Drop(peer, kind, reason))
        self.lose(peer, kind, reason)

    def restart(self, reason: str, unusable: bool = False) -> None:
        """The parameter server is gone: this generation ends, and what is known of slices is kept for the
        next.
        """
        self.server, self.server_at = None, None
        self.over = True
        had_model = [one.peer for one in self.members.values() if one.loaded or one.told_at is not None]
        self.keep_slices()
        self.decide(events.Restart(reason, unusable, self.failures.hand_on(self.short_since, had_model)))

    def is_early(self, round_: int) -> bool:
        """Is what was said of ``round_`` to be taken up when that is opened here? While a round is closing
        the next one begins elsewhere. A generation that goes on with another's executors hears of its first
        round before it has opened it, and of the next one if the parameter server had closed the first; if it
        had not, that next one was begun with a parameter server that was lost since, and nobody recorded it.
        """
        if round_ == self.round:
            return self.phase == "loading"
        first = self.phase == "loading" or self.round == self.start.round
        closed = self.start.taken_over and self.server_at in (None, self.start.round + 1)
        return round_ == self.round + 1 and (self.phase == "closing" or (first and closed))

    def holders(self) -> frozenset[str]:
        """Who has said that it runs on theta of the round that is about to be opened, or of the next one."""
        return frozenset(
            told.sender
            for told in self.early
            if isinstance(told.event, RoundStarted)
            and (told.event.round > self.round or self.theta in ("", told.event.theta))
        )

    def count_steps(self, part: Contribution) -> None:
        """The inner steps taken by the end of an applied round; nobody begins it with more than were taken
        by anybody before.
        """
        begun = min(part.steps, self.steps)
        self.steps = max(self.steps, begun + math.ceil(part.batches / self.rules.multiple))

    def claim_problem(self, worker: str, part: Contribution | None) -> str:
        """Why ``part``, for which an accepted update of ``worker`` in the open round is said to stand, cannot
        be true; empty where it can. No plan is asked: theta has it now, and a replay needs it.
        """
        if part is None:
            return "nothing is said of it; upgrade Hypha on its worker"
        if (part.worker, part.round) != (worker, self.round):
            return f"it is of round {part.round} of {part.worker}"
        member = self.members.get(worker)
        # another executor of it may have been told another size
        same = member is not None and member.incarnation == part.incarnation
        size = member.batch_size if member is not None and same else None
        most = self.rules.most_batch_size
        return contribution_problem(part, size, self.tracker.samples, most)

    def next_slice(self, asked: events.SliceAsked) -> Assignment | str:
        """The next slice of whoever asks, or why there is none right now."""
        caller, request = asked.caller, asked.request
        member, stamp = self.members.get(caller), request.stamp
        if (stamp.job_id, stamp.generation) != (self.start.job_id, self.start.generation):
            self.counts["stale generation"] += 1
            return "the job has begun another generation"
        if member is None:
            self.counts["uninvited"] += 1
            return "you take no part in this generation of the job"
        if self.over:
            return "this generation of the job is over"
        if member.incarnation and request.incarnation != member.incarnation:
            self.counts["stale incarnation"] += 1
            return "another process of yours takes part in the job"
        behind = member.started < self.round and stamp.round < self.round
        before = stamp.round == self.round and stamp.attempt < member.attempt
        if member.left_out or before or (member.missed and behind):
            return "your update was left out: wait for theta, then ask again"
        if stamp.round > self.round and caller not in self.updates.accepted:
            # it trains in the next round already; should its update turn out to be left out of this one, all
            # that it was given until then is taken back
            return "the round that you are in has not begun here yet: ask again"
        if request.held_from:
            keep = self.updates.finished(caller)
            self.tracker.dropped(caller, request.incarnation, request.held_from, keep)
        told = self.tracker.was_told(caller, request.incarnation, request.seq)
        if not told and self.tracker.rows_held(caller) >= self._may_hold(member):
            self.counts["slices held"] += 1
            member.hoarding += 1
            held = len(self.tracker.held(caller))
            if member.hoarding >= _HOARDING and not member.named:
                member.named = True
                text = "A worker asks for more slices again and again, and holds %d: more than it can use"
                self.log(logging.WARNING, caller, text, held)
            return f"{held} slices are yours: train on them first"
        return self.tracker.next(caller, request.incarnation, request.seq, request.cached)

    @property
    def ahead(self) -> int:
        """Slices that each worker may fetch before they are needed: all hold half an epoch at most."""
        return max(1, len(self.tracker.samples) // (2 * max(1, len(self.members))))

    def may_use(self, member: Member) -> int:
        """Rows that it may have trained on in this round, some of which may have been taken back since."""
        return max(self._may_hold(member), self.tracker.rows_held(member.peer))

    def _may_hold(self, member: Member, whole: bool = False) -> int:
        target = max(self.rules.samples, (self.rules.inner_steps or 0) * member.multiple * member.batch_size)
        return member.may_hold(min(self.ahead, _MOST_AHEAD), target, self.tracker.most_rows, whole)

    def keep_slices(self) -> None:
        self.kept = self.tracker.version
        self.decide(events.KeepSlices(self.tracker.to_state()))

    def send_model(self, member: Member, now: float) -> None:
        """Theta of the open round for ``member``, which begins it."""
        member.enter(now)
        self.planner.upset()
        self.to_server(SendModel(to=member.ref, attempt=member.attempt))

    def tell_members(self) -> None:
        """Whom the parameter server is to let in."""
        if not self.server_ready:
            return
        peers = tuple(member.ref for member in self.loaded)
        sizes = {member.peer: member.batch_size for member in self.loaded}
        most = self.rules.most_batch_size
        if most is not None:
            # the parameter server may have an update before the size of its batches is reported here
            most, sizes = max([most, *sizes.values()]), {}
        told = Members(
            peers=peers,
            round=self.round,
            most_samples=dict(self.limits),
            batch_sizes=sizes,
            most_batch_size=most,
        )
        self.to_server(told)

    @property
    def open_before(self) -> bool:
        """An earlier generation has begun the open round, so that there may be updates by plans of that."""
        return self.start.generation > 0 and self.round == self.start.round

    def tell_limits(self) -> None:
        """For how many samples updates may stand, once somebody's may stand for more than was told."""
        more = False
        for member in self.participants:
            most = member.most_samples(self.round, self.may_use(member))
            if self.open_before:
                whole = self._may_hold(member, whole=True)
                most = max(most or 0, whole, self.tracker.rows_held(member.peer))
            if most is not None and most > self.limits.get(member.peer, 0):
                self.limits[member.peer] = most
                more = True
        if more:
            self.tell_members()

    def to_server(self, directive: Directive) -> None:
        if self.server is not None:
            self.decide(events.Send(self.server, "aggregate", directive))

    def log(self, level: int, worker: str, text: str, *details: object) -> None:
        """About ``worker``."""
        logger.log(level, text, *details, extra={"worker_peer_id": worker, "job_id": self.start.job_id})

    def summary(self) -> dict[str, object]:
        return {
            "phase": self.phase,
            "round": self.round,
            "generation": self.start.generation,
            "members": len(self.members),
            "accepted": len(self.updates.accepted),
            "server_ready": self.server_ready,
            "steps": self.steps,
            "kept": self.kept,
        }
