"""A job as its scheduler sees it, told second by second; and the account of where its time goes."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest

from hypha.journal import Journal, JournalEntry
from hypha.messages import (
    Contribution,
    Event,
    ExecutorClass,
    JobStamp,
    Loaded,
    ModelReady,
    NextSlice,
    PeerRef,
    Progress,
    RoundApplied,
    RoundStarted,
    SliceRange,
    UpdateReceived,
    UpdateStatistics,
)
from hypha.scheduler.data.slices import SliceTracker
from hypha.scheduler.goodput.machine import Goodput
from hypha.scheduler.goodput.report import GoodputReport, Recovery
from hypha.scheduler.leasing import events as allocation
from hypha.scheduler.leasing.allocator import NAME as ALLOCATOR
from hypha.scheduler.leasing.renewal import NAME as RENEWAL
from hypha.scheduler.leasing.renewal import Lapsed, RenewalFailed, Renewed
from hypha.scheduler.rounds.events import (
    CarriedOver,
    GenerationBegan,
    Input,
    Joined,
    ParticipantLeaves,
    ParticipantLost,
    Record,
    Reported,
    SliceAsked,
    Told,
)
from hypha.scheduler.rounds.machine import RoundMachine
from hypha.scheduler.rounds.policy import Rules, Start
from hypha.scheduler.status.snapshot import Progressed
from hypha.telemetry.instruments import BADPUT_REASONS

BATCHES, BATCH = 4, 10


@dataclass
class Scene:
    """A real round machine whose peers say what a test has them say, when it has them say it. The scheduler
    begins at 100 s; two workers, ``a`` and ``b``, and a parameter server ``ps``; a round is four batches of a
    second and ten samples each. ``now`` is moved by :meth:`at`, in seconds since the scheduler began.
    """

    places: int = 2
    rules: Rules = field(
        default_factory=lambda: Rules(
            rounds=100,
            samples=80,
            inner_steps=BATCHES,
            min_workers=1,
            workers=2,
            grace_s=1.0,
            deadline_s=20.0,
        )
    )
    start: Start | None = field(default_factory=lambda: Start("job"))

    def __post_init__(self) -> None:
        self.now = 100.0
        self.progressed = Progressed()
        self.goodput = Goodput(self.places, self.now, lambda: getattr(self, "machine", None), self.progressed)
        self.news: list[Recovery] = []
        self.journal = Journal(checked=True)
        self.journal.listeners.append(self._listen)
        self.lives: dict[str, int] = {}
        self.asked = 0
        #: (when, number, what): what peers will say
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        if self.start is not None:
            self.begin(self.start)

    def _listen(self, entry: JournalEntry) -> None:
        if isinstance(entry.event, GenerationBegan):
            self.progressed.cut(entry.event.start.round)
        for action in entry.actions:
            if isinstance(action, Record):
                self.progressed.add(action.entry)
        self.news += self.goodput.handle(entry)
        self.goodput.validate()

    def begin(self, start: Start) -> None:
        """A life of the job."""
        scheduler, tracker = PeerRef(peer="scheduler"), SliceTracker((40,) * 9)
        self.machine = RoundMachine(self.rules, start, tracker, scheduler, CarriedOver(), self.journal)

    def next_generation(self, round_: int) -> None:
        """After the loss of a parameter server: the job goes on from ``round_``."""
        self.begin(Start("job", self.machine.start.generation + 1, round_, 0, f"t{round_}"))

    def at(self, seconds: float) -> Scene:
        until = 100.0 + seconds
        while self.queue and self.queue[0][0] <= until:
            self.now, _, call = heapq.heappop(self.queue)
            call()
        assert until >= self.now, "time goes back"
        self.now = until
        return self

    # --- leases

    def leased(self, *peers: str) -> None:
        for peer in peers:
            kind: ExecutorClass = "aggregate" if peer == "ps" else "train"
            self.journal.note(ALLOCATOR, self.now, allocation.Adopted(kind, f"of-{peer}", peer), (), {})

    def renewed(self, peer: str) -> None:
        self.journal.note(f"{RENEWAL}:of-{peer}", self.now, Renewed(10.0), (), {})

    def lease_lost(self, peer: str, reason: str) -> None:
        """The renewal gives up, the allocator hears of it, and then the round machine."""
        self.lease_expired(peer, reason)
        self.feed(ParticipantLost(peer, "aggregate" if peer == "ps" else "train", reason))

    def lease_expired(self, peer: str, reason: str = "expired; the last renewal: timed out") -> None:
        """The same, and the round machine has not heard of it yet."""
        lapsed = (Lapsed(reason),)
        self.journal.note(f"{RENEWAL}:of-{peer}", self.now, RenewalFailed(reason), lapsed, {})
        self.journal.note(ALLOCATOR, self.now, allocation.LeaseFailed(f"of-{peer}"), (), {})

    def leaves(self, peer: str, left_s: float, spare: str = "") -> None:
        """It ends soon; ``spare`` is leased meanwhile."""
        self.feed(ParticipantLeaves(peer, "train", left_s))
        if spare:
            self.leased(spare)
            self.joined(spare)

    def let_go(self, peer: str) -> None:
        """What was gone from the round machine is gone from the allocator, too."""
        self.journal.note(ALLOCATOR, self.now, allocation.LeaseFailed(f"of-{peer}", False), (), {})

    def give_everything_back(self) -> None:
        self.journal.note(ALLOCATOR, self.now, allocation.Want("train", 0), (), {})

    # --- what peers say

    def feed(self, event: Input) -> None:
        self.machine.handle(event, self.now)

    def tell(self, peer: str, event: Event) -> None:
        kind: ExecutorClass = "aggregate" if peer == "ps" else "train"
        start = self.machine.start
        stamp = JobStamp(job_id="job", generation=start.generation, round=self.machine.round)
        incarnation = f"{peer}-{self.lives.get(peer, 0)}"
        self.feed(Told(peer, kind, incarnation, stamp, event))

    def joined(self, *peers: str) -> None:
        for peer in peers:
            self.feed(Joined(PeerRef(peer=peer), "aggregate" if peer == "ps" else "train", BATCH))

    def loaded(self, *peers: str) -> None:
        for peer in peers:
            if peer == "ps":
                round_ = self.machine.round
                self.tell("ps", ModelReady(round=round_, theta=f"t{round_}", parameters=1, size_bytes=4))
            else:
                self.tell(peer, Loaded(incarnation=f"{peer}-{self.lives.get(peer, 0)}"))

    def started(self, *peers: str, attempt: int = 0) -> None:
        for peer in peers:
            round_ = self.machine.round
            self.tell(peer, RoundStarted(round=round_, theta=f"t{round_}", attempt=attempt))
            self.ask(peer, attempt)

    def ask(self, peer: str, attempt: int = 0) -> None:
        """For a slice, which holds the samples of a round."""
        self.asked += 1
        stamp = JobStamp(
            job_id="job",
            generation=self.machine.start.generation,
            round=self.machine.round,
            attempt=attempt,
        )
        incarnation = f"{peer}-{self.lives.get(peer, 0)}"
        self.feed(SliceAsked(peer, NextSlice(stamp=stamp, incarnation=incarnation, seq=self.asked)))

    def reported(self, peer: str, batches: int, busy_s: float | None = None, attempt: int = 0) -> None:
        progress = Progress(
            round=self.machine.round,
            batches=batches,
            samples=batches * BATCH,
            busy_s=float(batches) if busy_s is None else busy_s,
            loss=1.0,
            attempt=attempt,
        )
        stamp = JobStamp(job_id="job", generation=self.machine.start.generation, round=self.machine.round)
        self.feed(Reported(peer, f"{peer}-{self.lives.get(peer, 0)}", stamp, progress))

    def update(self, peer: str, attempt: int = 0) -> None:
        """It is with the parameter server."""
        if not self.machine.tracker.held(peer):
            self.ask(peer, attempt)
        (epoch, index), *_ = self.machine.tracker.held(peer)
        part = Contribution(
            round=self.machine.round,
            worker=peer,
            incarnation=f"{peer}-{self.lives.get(peer, 0)}",
            samples=BATCHES * BATCH,
            batches=BATCHES,
            batch_size=BATCH,
            steps=0,
            ranges=(SliceRange(epoch=epoch, slice=index, start=0, stop=BATCHES * BATCH),),
            finished=((epoch, index),),
            attempt=attempt,
        )
        received = UpdateReceived(round=part.round, worker=peer, samples=part.samples, contribution=part)
        self.tell("ps", received)

    def applied(self, *contributors: str, updates: tuple[UpdateStatistics, ...] = ()) -> None:
        round_ = self.machine.round
        theta = f"t{round_ + 1}"
        applied = RoundApplied(round=round_, theta=theta, contributors=contributors, updates=updates)
        self.tell("ps", applied)

    # --- whole stretches

    def opened(self) -> Scene:
        """Leases at 1 s, executors at 2 s, all loaded at 3 s, both training from 4 s on."""
        self.at(1).leased("ps", "a", "b")
        self.at(2).joined("ps", "a", "b")
        self.at(3).loaded("ps", "a", "b")
        self.at(4).started("a", "b")
        return self

    def trains(self, began: float, *peers: str, attempt: int = 0) -> Scene:
        """A batch a second, reported when it is done, the last at ``began + 4``; as time gets there."""
        for batch in range(1, BATCHES + 1):
            for peer in peers:
                call = partial(self.reported, peer, batch, attempt=attempt)
                heapq.heappush(self.queue, (100.0 + began + batch, len(self.queue), call))
        return self

    # --- what came of it

    def report(self) -> GoodputReport:
        found = self.goodput.report(self.now)
        total = found.goodput_s + sum(found.badput_s.values())
        assert total == pytest.approx(found.places * found.wall_s, abs=1e-6)
        assert list(found.badput_s) == list(BADPUT_REASONS)
        return found

    def steps(self) -> list[tuple[str, float]]:
        """Reasons of failures, and what each was detected, replaced and caught up with after."""
        return [
            ("catch-up", one.catch_up_s)
            if one.catch_up_s is not None
            else ("replace", one.replace_s)
            if one.replace_s is not None
            else (one.reason, one.detect_s)
            for one in self.news
        ]

    def split(self) -> dict[str, float]:
        found = self.report()
        named = {"goodput": found.goodput_s, **found.badput_s}
        return {name: round(seconds, 6) for name, seconds in named.items() if seconds}
