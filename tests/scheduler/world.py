"""A small world under a virtual clock: peers that speak the real messages to a real round machine.

Workers train, synchronise and die; a parameter server applies; the network delays, repeats and reorders.
Nothing here is a stand-in for our classes: it plays the *other* side of the wire.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from hypha.journal import Journal
from hypha.messages import (
    CheckpointSaved,
    CloseRound,
    Contribution,
    Directive,
    Event,
    ExecutorClass,
    ExecutorError,
    ExecutorExited,
    Export,
    Exported,
    JobStamp,
    LedgerRound,
    Loaded,
    Members,
    ModelReady,
    NextSlice,
    PeerRef,
    Plan,
    Progress,
    RoundApplied,
    RoundStarted,
    SendModel,
    SliceRange,
    UpdateReceived,
    UpdateRefused,
)
from hypha.scheduler.data.slices import Assignment, SliceTracker, TrackerState
from hypha.scheduler.rounds.events import (
    Action,
    Again,
    AnswerSlice,
    Drop,
    Fail,
    GoesOn,
    Input,
    Joined,
    KeepSlices,
    LetGo,
    ParticipantLeaves,
    ParticipantLost,
    Publish,
    Record,
    Reported,
    Restart,
    Send,
    SliceAsked,
    TimePassed,
    Told,
)
from hypha.scheduler.rounds.machine import RoundMachine
from hypha.scheduler.rounds.policy import Rules, Start

SCHEDULER = PeerRef(peer="scheduler")


@dataclass
class Worker:
    """An executor on a machine: ``batch_s`` per batch; what is on it ends when ``alive`` is False."""

    peer: str
    batch_s: float
    batch_size: int = 4
    load_s: float = 0.1
    upload_s: float = 0.01
    #: of theta on its way to it; a newer one is sent in its place
    theta_s: float = 0.0
    alive: bool = True
    hung: bool = False
    #: it lives, and its batch does not end
    stalled: bool = False
    poisoned: bool = False
    incarnation: str = ""
    round: int = -1
    attempt: int = 0
    batches: int = 0
    busy_s: float = 0.0
    steps: int = 0
    seq: int = 0
    plan: dict[int, int | None] = field(default_factory=dict)
    slices: list[list[int]] = field(default_factory=list)  # epoch, index, next row, samples
    ranges: list[SliceRange] = field(default_factory=list)
    finished: list[tuple[int, int]] = field(default_factory=list)
    training: bool = False
    waiting_since: float = 0.0
    idle_s: float = 0.0
    generation: int = 0
    theta_life: int = 0
    held_from: int = 0
    loaded: bool = False
    #: the update of this round
    current: Contribution | None = None
    #: a parameter server has it
    acknowledged: Contribution | None = None


def received(part: Contribution) -> UpdateReceived:
    """What the parameter server reports of an update that it has added."""
    return UpdateReceived(round=part.round, worker=part.worker, samples=part.samples, contribution=part)


@dataclass
class World:
    """``delay(rng)`` is one message's time under way; ``repeat`` the chance that it comes twice."""

    rules: Rules
    samples: tuple[int, ...] = (40,) * 10
    seed: int = 0
    delay: tuple[float, float] = (0.005, 0.02)
    repeat: float = 0.0
    report_s: float = 0.1
    outer_s: float = 0.02
    journal: Journal = field(default_factory=lambda: Journal(checked=True))

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.now = 1000.0
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.machine = RoundMachine(
            self.rules, Start("job"), SliceTracker(self.samples), SCHEDULER, journal=self.journal
        )
        self.workers: dict[str, Worker] = {}
        self.members: tuple[str, ...] = ()
        self.server_round = 0
        self.server_alive = True
        self.updates: dict[str, Contribution] = {}
        self.applied: list[tuple[int, tuple[Contribution, ...]]] = []
        self.records: dict[int, LedgerRound] = {}
        self.actions: list[Action] = []
        self.dropped: list[str] = []
        self.let_go: list[str] = []
        self.ended: Publish | Fail | Restart | None = None
        self.hooks: list[Callable[[Action], None]] = []
        self.lives = itertools.count()
        self.last: dict[str, float] = {}
        self.lost_theta: set[str] = set()
        #: the newest one, by worker
        self.sent_theta: dict[str, tuple[int, int, int]] = {}
        self.contributors: tuple[str, ...] = ()
        self.server_generation = 0
        #: what was reported of the round before the open one
        self.said_applied: list[Event] = []
        #: what a ledger has: where the open round begins, the steps before it, and who trains on what
        self.book = (0, 0, self.machine.tracker.to_state())
        #: from where each round can be started again
        self.starts: dict[int, tuple[int, TrackerState]] = {0: self.book[1:]}
        self.scheduler_alive = True
        self.rounds_lost = 0
        #: parameter servers lost so far
        self.servers = 0

    # --- the network

    def at(self, after_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.now + after_s, next(self.order), call))

    def hop(self) -> float:
        return self.rng.uniform(*self.delay)

    def tell(self, sender: str, kind: ExecutorClass, incarnation: str, event: Event, round_: int = 0) -> None:
        generation = self.server_generation if kind == "aggregate" else self.workers[sender].generation
        stamp = JobStamp(job_id="job", generation=generation, round=round_)
        told = Told(sender, kind, incarnation, stamp, event)
        for _ in range(2 if self.rng.random() < self.repeat else 1):
            self.at(self.hop(), lambda: self.feed(told))

    def feed(self, event: Input) -> None:
        if not self.scheduler_alive:
            return
        for action in self.machine.handle(event, self.now):
            self.actions.append(action)
            for hook in self.hooks:
                hook(action)
            match action:
                case Send(to=to, directive=directive):
                    # steering keeps the order for each executor
                    due = max(self.now + self.hop(), self.last.get(to.peer, 0.0))
                    self.last[to.peer] = due
                    life = self.machine.start.generation
                    self.at(
                        due - self.now,
                        lambda to=to.peer, told=directive, life=life: self.directive(to, told, life),
                    )
                case Record(entry=entry, tracker=tracker, steps=steps):
                    self.records[entry.round] = entry
                    if tracker is not None:
                        self.book = (entry.round + 1, steps, tracker)
                        self.starts[entry.round + 1] = (steps, tracker.unassigned())
                case KeepSlices(tracker=tracker):
                    self.book = (*self.book[:2], tracker)
                case Drop(peer=peer, kind="train"):
                    self.dropped.append(peer)
                    self.workers[peer].alive = False
                case LetGo(peer=peer, kind="train"):
                    self.let_go.append(peer)
                    self.workers[peer].alive = False
                case Again(peer=peer, pause_s=pause_s):
                    self.at(pause_s, lambda peer=peer: self.restart(peer))
                case Publish() | Fail() | Restart():
                    self.ended = action
                case _:
                    pass

    def directive(self, to: str, directive: Directive, life: int = 0) -> None:
        """It arrives; what is of another life than its receiver's is refused."""
        if life != (self.server_generation if to == "ps" else self.workers[to].generation):
            return
        match directive:
            case Plan(round=round_, batches=batches):
                worker = self.workers[to]
                if worker.alive:
                    worker.plan[round_] = batches
                    self.maybe_sync(worker)
            case Members(peers=peers):
                self.members = tuple(ref.peer for ref in peers)
            case SendModel(to=ref, attempt=attempt) if self.server_alive:
                self.theta(ref.peer, self.contributors, attempt)
            case CloseRound(round=round_, checkpoint=checkpoint) if self.server_alive:
                if round_ == self.server_round:
                    server = self.servers
                    self.at(self.outer_s, lambda: self.apply(round_, checkpoint, server))
            case Export() if self.server_alive:
                self.say_server(Exported(round=self.server_round, files=("model.safetensors",)))
            case _:
                pass

    # --- the parameter server

    def say_server(self, event: Event) -> None:
        self.tell("ps", "aggregate", "ps-1", event, self.server_round)

    def apply(self, round_: int, checkpoint: bool, server: int) -> None:
        if not self.server_alive or round_ != self.server_round or server != self.servers:
            return
        parts = tuple(self.updates.values())
        self.applied.append((round_, parts))
        self.updates = {}
        self.server_round += 1
        names = tuple(part.worker for part in parts)
        self.contributors = names
        applied = RoundApplied(round=round_, theta=f"t{round_ + 1}", contributors=names)
        self.said_applied = [*map(received, parts), applied]
        self.say_server(applied)
        if checkpoint:
            self.say_server(CheckpointSaved(round=self.server_round, place="scheduler"))
        for peer in self.members:
            self.theta(peer, names)

    def theta(self, peer: str, contributors: tuple[str, ...], attempt: int = 0) -> None:
        round_, life = self.server_round, self.server_generation
        if peer in self.lost_theta:
            self.lost_theta.remove(peer)
            return
        turn = self.sent_theta[peer] = (life, round_, attempt)
        way_s = self.workers[peer].theta_s

        def arrive() -> None:
            if way_s == 0.0 or turn >= self.sent_theta[peer]:
                self.receive_theta(peer, round_, contributors, attempt, life)

        self.at(self.hop() + way_s, arrive)

    def receive_update(self, worker: Worker, part: Contribution) -> None:
        if not worker.alive or worker.hung or worker.current is not part:
            return
        if not self.server_alive or worker.generation != self.server_generation:
            # one of them has not heard of the new life yet
            self.at(0.2, lambda: self.receive_update(worker, part))
            return
        if self.updates.get(worker.peer) == part:
            # sent again, as the acknowledgement was lost
            return
        if worker.poisoned or part.round != self.server_round or worker.peer in self.updates:
            code = "stale" if part.round != self.server_round else "invalid"
            self.say_server(
                UpdateRefused(round=part.round, worker=worker.peer, code=code, reason="not finite")
            )
            return
        self.updates[worker.peer] = part
        worker.acknowledged = part
        self.say_server(received(part))

    # --- workers

    def add(self, worker: Worker) -> Worker:
        worker.incarnation = f"{worker.peer}-{next(self.lives)}"
        self.workers[worker.peer] = worker
        self.feed(Joined(PeerRef(peer=worker.peer), "train", worker.batch_size))
        worker.generation = self.machine.start.generation
        self.at(worker.load_s, lambda: self.load(worker))
        return worker

    def load(self, worker: Worker) -> None:
        worker.loaded = True
        self.say(worker, Loaded(incarnation=worker.incarnation))

    def say(self, worker: Worker, event: Event) -> None:
        if worker.alive and not worker.hung:
            self.tell(worker.peer, "train", worker.incarnation, event, max(0, worker.round))

    def kill(self, peer: str, noticed_s: float = 0.5) -> None:
        self.workers[peer].alive = False
        self.at(noticed_s, lambda: self.feed(ParticipantLost(peer, "train", "its lease ended")))

    def leave(self, peer: str, left_s: float) -> None:
        """It says once a second that it ends, and does; its lease is handed back then."""
        worker, ends_at = self.workers[peer], self.now + left_s

        def say() -> None:
            if not worker.alive:
                return
            if self.now >= ends_at - 1e-9:
                self.kill(peer, noticed_s=0.05)
                return
            self.feed(ParticipantLeaves(peer, "train", ends_at - self.now))
            self.at(min(1.0, ends_at - self.now), say)

        say()

    def restart(self, peer: str) -> None:
        """Another process on the same machine."""
        old = self.workers[peer]
        old.alive = False
        self.add(Worker(old.peer, old.batch_s, old.batch_size, old.load_s, old.upload_s))

    def fail(self, peer: str, kind: str, message: str, ends: bool = True) -> None:
        """It says why it cannot go on, and ends."""
        self.say(self.workers[peer], ExecutorError(kind=kind, message=message))
        if ends:
            # a worker passes on one event after the other
            self.at(0.1, lambda: self.crash(peer))

    def crash(self, peer: str) -> None:
        worker = self.workers[peer]
        self.say(
            worker, ExecutorExited(exit_code=1, tail="Segmentation fault", incarnation=worker.incarnation)
        )
        worker.alive = False

    def receive_theta(
        self, peer: str, round_: int, contributors: tuple[str, ...], attempt: int, life: int = 0
    ) -> None:
        worker = self.workers[peer]
        if not worker.alive or worker.hung or life < worker.generation:
            return
        if life > worker.generation:
            # refused as too early, and tried again
            self.at(0.2, lambda: self.receive_theta(peer, round_, contributors, attempt, life))
            return
        if round_ < worker.round and life <= worker.theta_life:
            return
        worker.theta_life = life
        if round_ == worker.round and attempt <= worker.attempt:
            self.say(worker, RoundStarted(round=round_, theta=f"t{round_}", attempt=worker.attempt))
            return
        worker.attempt = attempt
        if worker.round >= 0 and (peer not in contributors or round_ != worker.round + 1):
            worker.slices.clear()
            worker.held_from = worker.seq + 1
        worker.current = None
        if worker.waiting_since:
            worker.idle_s += self.now - worker.waiting_since
            worker.waiting_since = 0.0
        worker.round, worker.batches, worker.busy_s = round_, 0, 0.0
        worker.ranges, worker.finished = [], []
        worker.training = True
        self.say(worker, RoundStarted(round=round_, theta=f"t{round_}", attempt=attempt))
        self.step(worker, round_)
        self.report(worker, round_, worker.incarnation)

    def step(self, worker: Worker, round_: int) -> None:
        if self.take(worker):
            self.at(worker.batch_s, lambda: self.batch_done(worker, round_))
        else:
            self.at(0.1, lambda: self.again(worker, round_))

    def again(self, worker: Worker, round_: int) -> None:
        if worker.training and worker.round == round_ and worker.alive:
            self.step(worker, round_)

    def take(self, worker: Worker) -> bool:
        while sum(part[3] - part[2] for part in worker.slices) < worker.batch_size:
            worker.seq += 1
            stamp = JobStamp(
                job_id="job", generation=worker.generation, round=worker.round, attempt=worker.attempt
            )
            question = NextSlice(
                stamp=stamp, incarnation=worker.incarnation, seq=worker.seq, held_from=worker.held_from
            )
            got = self.ask(worker.peer, question) if self.scheduler_alive else None
            if got is None:
                worker.seq -= 1
                return False
            assert self.ask(worker.peer, question) == got
            worker.slices.append([got.epoch, got.index, 0, got.samples])
        return True

    def ask(self, peer: str, question: NextSlice) -> Assignment | None:
        """The slice that is answered, once the book has it."""
        answers = []
        for action in self.machine.handle(SliceAsked(peer, question), self.now):
            match action:
                case KeepSlices(tracker=tracker):
                    self.book = (*self.book[:2], tracker)
                case AnswerSlice(slice=part):
                    assert part is None or self.machine.tracker.version == self.book[2].version
                    answers.append(part)
                case _:
                    raise AssertionError(action)
        (answer,) = answers
        return answer

    def batch_done(self, worker: Worker, round_: int) -> None:
        if not worker.alive or worker.hung or worker.round != round_ or not worker.training:
            return
        left = worker.batch_size
        while left:
            epoch, index, row, samples = worker.slices[0]
            taken = min(left, samples - row)
            worker.ranges.append(SliceRange(epoch=epoch, slice=index, start=row, stop=row + taken))
            worker.slices[0][2] += taken
            left -= taken
            if row + taken == samples:
                worker.finished.append((epoch, index))
                worker.slices.pop(0)
        worker.batches += 1
        worker.busy_s += worker.batch_s
        if not self.maybe_sync(worker):
            self.step(worker, round_)

    def maybe_sync(self, worker: Worker) -> bool:
        plan = worker.plan.get(worker.round)
        if not worker.training or plan is None or worker.batches < plan or not worker.batches:
            return False
        worker.training = False
        worker.waiting_since = self.now
        self.progress(worker)
        part = Contribution(
            round=worker.round,
            worker=worker.peer,
            incarnation=worker.incarnation,
            samples=worker.batches * worker.batch_size,
            batches=worker.batches,
            batch_size=worker.batch_size,
            steps=worker.steps,
            ranges=tuple(worker.ranges),
            finished=tuple(worker.finished),
            attempt=worker.attempt,
        )
        worker.steps += worker.batches
        worker.current = part
        self.at(worker.upload_s, lambda: self.receive_update(worker, part))
        return True

    def report(self, worker: Worker, round_: int, incarnation: str) -> None:
        if worker.round == round_ and worker.training and worker.alive and not worker.hung:
            self.progress(worker)
            self.at(self.report_s, lambda: self.report(worker, round_, incarnation))

    def progress(self, worker: Worker) -> None:
        if not worker.batches:
            return
        said = Progress(
            round=worker.round,
            batches=worker.batches,
            samples=worker.batches * worker.batch_size,
            busy_s=worker.busy_s,
            loss=1.0,
            attempt=worker.attempt,
        )
        stamp = JobStamp(job_id="job", generation=worker.generation, round=worker.round)
        report = Reported(worker.peer, worker.incarnation, stamp, said)
        for _ in range(2 if self.rng.random() < self.repeat else 1):
            self.at(self.hop(), lambda: self.feed(report))

    # --- other lives

    def take_over(self, away_s: float) -> None:
        """The scheduler dies; after a while another one goes on from the book."""
        if not self.scheduler_alive:
            return
        self.scheduler_alive = False
        self.at(away_s, self.go_on)

    def go_on(self) -> None:
        round_, steps, tracker = self.book
        theta = f"t{round_}" if round_ or self.server_round else ""
        start = Start("job", self.machine.start.generation + 1, round_, steps, theta, taken_over=True)
        self.live(start, tracker)
        self.say_again(start)

    def lose_server(self, checkpoint: int) -> None:
        """The parameter server dies; another one is restored from the newest round that is no later than
        ``checkpoint`` and can be started.
        """
        if not self.scheduler_alive or self.ended is not None:
            return
        self.server_alive = False
        self.feed(ParticipantLost("ps", "aggregate", "its lease ended"))
        if not isinstance(self.ended, Restart):
            return
        self.ended = None
        round_ = max(number for number in self.starts if number <= max(0, min(checkpoint, self.book[0])))
        lost = round_ < self.book[0]
        # what it had applied is undone, even if nobody recorded it: who went on from there begins its round
        # anew, with other slices than those it held
        self.rounds_lost += max(self.server_round, self.book[0]) - round_
        steps, tracker = self.starts[round_]
        self.starts = {number: start for number, start in self.starts.items() if number <= round_}
        self.applied = [(number, parts) for number, parts in self.applied if number < round_]
        self.records = {number: entry for number, entry in self.records.items() if number < round_}
        theta = f"t{round_}" if round_ else ""
        start = Start("job", self.machine.start.generation + 1, round_, steps, theta)
        self.live(start, tracker if lost else self.machine.tracker.to_state())
        before = self.records.get(round_ - 1)
        self.server_alive, self.server_round, self.updates = True, round_, {}
        self.servers += 1
        self.contributors = tuple(part.worker for part in before.contributors) if before is not None else ()
        self.said_applied, self.server_generation, self.members = [], start.generation, ()
        ready = ModelReady(round=round_, theta=f"t{round_}", parameters=1, size_bytes=4)
        server = self.servers

        def loaded() -> None:
            # another one may have been lost meanwhile
            if server == self.servers:
                self.say_server(ready)

        self.at(1.0, loaded)
        self.say_again(start, lost)

    def live(self, start: Start, tracker: TrackerState) -> None:
        """Another machine, of another life."""
        self.scheduler_alive = True
        old = self.machine
        had_model = [member.peer for member in old.loaded]
        carried = old.failures.hand_on(old.short_since, had_model)
        slices = SliceTracker.from_state(tracker)
        held = {worker.peer for worker in self.workers.values() if worker.alive}
        for peer in slices.holders:
            if peer not in held:
                slices.forget(peer)
        self.machine = RoundMachine(self.rules, start, slices, SCHEDULER, carried, self.journal)
        self.book = (start.round, start.steps, tracker)
        self.feed(Joined(PeerRef(peer="ps"), "aggregate"))
        for worker in self.workers.values():
            if worker.alive:
                self.feed(Joined(PeerRef(peer=worker.peer), "train", worker.batch_size))

    def say_again(self, start: Start, lost: bool = False) -> None:
        """``Rejoin`` comes to everybody."""
        for worker in self.workers.values():
            if worker.alive and not worker.hung:
                self.at(self.hop(), lambda worker=worker: self.worker_rejoins(worker, start, lost))
        if start.taken_over:
            self.at(self.hop(), lambda: self.server_rejoins(start.generation))

    def worker_rejoins(self, worker: Worker, start: Start, lost: bool) -> None:
        if not worker.alive or worker.hung or start.generation <= worker.generation:
            return
        worker.generation = start.generation
        self.feed(GoesOn(worker.peer, "train"))
        if not worker.loaded or worker.stalled:
            return
        self.say(worker, Loaded(incarnation=worker.incarnation))
        if lost:
            worker.round, worker.attempt, worker.training = -1, 0, False
            worker.current = None
            worker.plan.clear()
            worker.slices.clear()
            worker.held_from = worker.seq + 1
            return
        if worker.round >= 0:
            event = RoundStarted(round=worker.round, theta=f"t{worker.round}", attempt=worker.attempt)
            self.say(worker, event)
        part = worker.current
        if part is not None and not (start.taken_over and worker.acknowledged is part):
            self.at(self.hop(), lambda: self.receive_update(worker, part))

    def server_rejoins(self, generation: int) -> None:
        if not self.server_alive or generation <= self.server_generation:
            return
        self.server_generation = generation
        for event in self.said_applied:
            self.say_server(event)
        ready = ModelReady(round=self.server_round, theta=f"t{self.server_round}", parameters=1, size_bytes=4)
        self.say_server(ready)
        for part in self.updates.values():
            self.say_server(received(part))

    # --- time

    def begin(self) -> None:
        self.feed(Joined(PeerRef(peer="ps"), "aggregate"))
        ready = ModelReady(round=self.server_round, theta=f"t{self.server_round}", parameters=1, size_bytes=4)
        self.at(0.1, lambda: self.say_server(ready))

    def run(self, limit_s: float = 1e6, until: Callable[[], bool] = lambda: False) -> None:
        """Until the job ended, ``until()`` holds, or the clock has gone ``limit_s`` further."""
        end = self.now + limit_s
        tick = self.now
        while self.ended is None and not until() and self.now < end:
            if self.queue and self.queue[0][0] <= tick:
                self.now, _, call = heapq.heappop(self.queue)
                call()
            else:
                self.now = tick
                tick += 0.1 if limit_s < 1e5 else 0.25
                self.feed(TimePassed())
