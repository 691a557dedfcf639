"""What must be true of every run of a simulated world, whatever was struck."""

from __future__ import annotations

import math
import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import trio
from safetensors.torch import load_file

from hypha.errors import HyphaError
from hypha.executor.files import tensors
from hypha.executor.files.theta import theta_of
from hypha.executor.inner.local_model import LocalModel
from hypha.executor.inner.loop import Processor
from hypha.executor.outer.archive import THETA
from hypha.executor.replay import Replay
from hypha.executor.toy import ToyModel
from hypha.journal import JournalEntry
from hypha.messages import LedgerFile, LedgerRound
from hypha.net.bulk.files import hash_file
from hypha.rules.leases import Freed, LeaseEnded
from hypha.scheduler.data.slices import TrackerState
from hypha.scheduler.durable.ledger import read_ledger
from hypha.scheduler.durable.state_directory import CheckpointStore, StateDirectory
from hypha.scheduler.job.states import JobResult
from hypha.scheduler.rounds.events import Drop, LetGo, Told
from hypha.scheduler.rounds.machine import NAME as ROUNDS
from hypha.scheduler.status.snapshot import JobSnapshot
from hypha.simulation.configurations import JOB
from hypha.simulation.faults import FaultOutcome
from hypha.simulation.scenario import LIES
from hypha.simulation.world import SCHEDULER, World
from hypha.worker.leasing.arbiter import NAME as ARBITER
from hypha.worker.leasing.events import SendOffer

#: leases are released at once, executors end, and what was on its way arrives
_SETTLE_S = 60.0


def counted(ledger: LedgerFile) -> list[LedgerRound]:
    """The rounds that make up the trained model."""
    return [entry for entry in ledger.rounds if not entry.discarded]


def check_ledgers(world: World) -> list[str]:
    """Of each job that is done: every round was applied once; theta is what the ledger says that it is,
    unless a worker made up its updates, which nobody can see.
    """
    return [
        problem if name == SCHEDULER else f"{name}: {problem}"
        for name, result in world.results.items()
        for problem in _check_ledger(world, name, result)
    ]


def _check_ledger(world: World, scheduler: str, result: JobResult) -> list[str]:
    found: list[str] = []
    state = world.computers[scheduler].directory / "state" / JOB
    ledger = read_ledger(state / "job.db")
    entries = counted(ledger)
    rounds = [entry.round for entry in entries]
    if rounds != list(range(world.scenario.rounds)):
        found.append(f"the ledger's rounds are {rounds}")
    generations = [entry.generation for entry in entries]
    if generations != sorted(generations):
        found.append(f"a round of an older generation follows one of a newer: {generations}")
    with tempfile.TemporaryDirectory(prefix="hypha-replay-", dir=world.root) as scratch:
        try:
            theta = theta_of(ToyModel().requires_grad_(False))
            local = LocalModel(ledger.job, None, Processor(), keeps_base=False)
            hashes = list(Replay(ledger, world.root / "dataset", Path(scratch), theta, local).run())
        except HyphaError as exc:
            found.append(f"the ledger cannot be replayed: {exc}")
        else:
            recorded = [ledger.theta, *(entry.theta for entry in entries)]
            wrong = [
                number
                for number, (ours, theirs) in enumerate(zip(hashes, recorded, strict=False))
                if ours != theirs
            ]
            made_up = any(fault.way == "blow-up" for fault in world.scenario.faults)
            if (wrong and not made_up) or len(hashes) != len(recorded):
                found.append(f"theta of rounds {wrong} is not what a replay gives")
    model = Path(result.output) / "model.safetensors"
    again = world.root / "published.safetensors"
    if not model.is_file() or tensors.write(again, load_file(model)).blake3 != result.theta:
        found.append("the published model is not theta of the last round")
    return found + _check_samples(state / "job.db", entries)


def _check_samples(path: Path, entries: list[LedgerRound]) -> list[str]:
    """Every row of an epoch was used. Rows are used once: a slice is only begun again by somebody who was
    left out of a round, or by another generation of an executor, to which it was given after it was taken
    back.
    """
    found: list[str] = []
    used: dict[tuple[int, int], set[int]] = defaultdict(set)
    #: where a generation of an optimizer stopped in a slice, and in which round
    stopped: dict[tuple[int, int, str, int], tuple[int, int]] = {}
    took_part: dict[int, dict[str, int]] = {}
    for entry in entries:
        took_part[entry.round] = {part.incarnation: entry.generation for part in entry.contributors}
        workers = [part.worker for part in entry.contributors]
        if len(set(workers)) != len(workers):
            found.append(f"round {entry.round} holds two updates of one worker")
        for part in entry.contributors:
            if part.samples != sum(span.stop - span.start for span in part.ranges):
                found.append(f"{part.worker} names other rows in round {part.round} than {part.samples}")
            for span in part.ranges:
                key = (span.epoch, span.slice, part.incarnation, part.restarts)
                round_, stop = stopped.get(key, (entry.round, 0))
                between = range(round_, entry.round)
                kept = all(part.incarnation in took_part.get(one, {}) for one in between)
                same_generation = (
                    len({took_part[one].get(part.incarnation) for one in (*between, entry.round)}) == 1
                )
                if span.start != stop and not (span.start == 0 and not (kept and same_generation)):
                    found.append(
                        f"{part.worker} went on at row {span.start} of slice {(span.epoch, span.slice)} "
                        f"in round {entry.round}, and had stopped at row {stop} in round {round_}"
                    )
                stopped[key] = (entry.round, span.stop)
                used[span.epoch, span.slice] |= set(range(span.start, span.stop))
    with closing(sqlite3.connect(path)) as db:
        (text,) = db.execute("SELECT tracker FROM starts ORDER BY round DESC LIMIT 1").fetchone()
    tracker = msgspec.json.decode(text, type=TrackerState)
    open_epochs = {epoch.epoch: epoch.used for epoch in tracker.epochs}
    for epoch in range(tracker.next_epoch):
        for index in open_epochs.get(epoch, range(len(tracker.samples))):
            missing = set(range(tracker.samples[index])) - used[epoch, index]
            if missing:
                found.append(
                    f"slice {index} of epoch {epoch} counts as used; rows {sorted(missing)[:3]} never were"
                )
    return found


def check_checkpoints(world: World) -> list[str]:
    """A checkpoint that the ledger names is there, and is theta of its round."""
    state = world.computers[SCHEDULER].directory / "state" / JOB
    path = state / "job.db"
    if not path.is_file():
        return []
    with closing(sqlite3.connect(path)) as db:
        try:
            job = db.execute("SELECT job_id, theta FROM job").fetchone()
            rows = db.execute("SELECT round FROM checkpoints WHERE place = 'scheduler'").fetchall()
            thetas = dict(db.execute("SELECT round + 1, theta FROM rounds WHERE discarded = 0").fetchall())
        except sqlite3.Error:
            return []  # it was killed before there were tables
    if job is None:
        return []
    store = CheckpointStore(_Place(state), job[0], keep=1000)
    found = []
    for (round_,) in rows:
        if any(path.parent == store.path(round_, THETA).parent for path in world.damaged):
            continue
        directory = store.path(round_, THETA).parent
        seen = tuple(
            (path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(directory.glob("*"))
        )
        if seen and world.verified.get(directory) == seen:
            continue
        world.verified[directory] = seen
        if not store.verify(round_):
            found.append(f"the checkpoint for round {round_} is said to exist, and cannot be restored")
        elif round_ in thetas and hash_file(store.path(round_, THETA))[1] != thetas[round_]:
            found.append(f"the checkpoint for round {round_} holds another theta than the ledger says")
    return found


class _Place(StateDirectory):
    """To look at, without its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.incoming = path / "incoming"
        self._lock = -1


class RoundWatch:
    """Notes when rounds begin; :meth:`check` says which lasted longer than whatever was struck explains, and
    whether what was reported in another generation has ended somebody's part.
    """

    #: an undisturbed round, the first one's loading and the export included
    PLAIN_S = 60.0
    #: what one fault may cost beyond its own length: noticing it (liveness, a hang), a lease's end, another
    #: worker and its loading, a deadline that is three times as long for a first synchronisation, pauses
    FAULT_S = 120.0

    def __init__(self) -> None:
        self._began: list[tuple[float, int]] = []
        self._members = 0
        self._problems: list[str] = []

    def listen(self, entry: JournalEntry) -> None:
        if entry.machine != ROUNDS or isinstance(entry.state, str):
            return
        round_ = int(str(entry.state["round"]))
        if not self._began or self._began[-1][1] != round_:
            self._began.append((entry.at_s, round_))
        before, self._members = self._members, int(str(entry.state["members"]))
        event = entry.event
        if isinstance(event, Told) and event.stamp.generation != entry.state["generation"]:
            dropped = any(isinstance(action, Drop | LetGo) for action in entry.actions)
            if self._members < before and not dropped:
                self._problems.append(f"a report of generation {event.stamp.generation} ended a part")

    def check(self, struck: list[FaultOutcome], now: float) -> list[str]:
        found = list(self._problems)
        ends = [*[began for began, _ in self._began[1:]], now]
        for (began, round_), end in zip(self._began, ends, strict=True):
            allowed_s = self.PLAIN_S
            for one in struck:
                if one.struck_at is None or one.struck_at > end:
                    continue
                # the others go on without one that stalls, or lies
                lasts = one.fault.way != "stall" and one.fault.way not in LIES
                mended_at = one.struck_at + (one.fault.for_s if lasts else 0.0)
                if mended_at > began - self.FAULT_S:
                    allowed_s += max(0.0, mended_at - max(one.struck_at, began)) + self.FAULT_S
            if end - began > allowed_s:
                text = (
                    f"round {round_} lasted {end - began:.0f} s; what was struck explains {allowed_s:.0f} s"
                )
                found.append(text)
        return found


class LeaseWatch:
    """Keeps a record of a worker's leases beside its own: each is granted, ends and is freed once."""

    def __init__(self, name: str, tell: Callable[[str], None]) -> None:
        self._name = name
        self._tell = tell
        self._live: set[str] = set()
        self._draining: set[str] = set()

    def listen(self, entry: JournalEntry) -> None:
        if entry.machine != ARBITER or isinstance(entry.state, str) or not entry.state:
            return
        for action in entry.actions:
            match action:
                case SendOffer(offer=offer):
                    self._live.add(offer.lease_id)
                case LeaseEnded(lease=lease):
                    if lease.lease_id not in self._live:
                        self._tell(f"{self._name}: a lease ended twice")
                    self._live.discard(lease.lease_id)
                    if lease.hold_s > 0:
                        self._draining.add(lease.lease_id)
                case Freed(lease=lease):
                    if lease.lease_id not in self._draining:
                        self._tell(f"{self._name}: the resources of a lease were freed twice")
                    self._draining.discard(lease.lease_id)
                case _:
                    pass
        held = (entry.state["leases"], entry.state["draining"])
        if held != (len(self._live), len(self._draining)):
            self._tell(
                f"{self._name} holds {held} leases (live, draining) and should hold "
                f"{(len(self._live), len(self._draining))}"
            )


class GoodputWatch:
    """Looks at each of the scheduler's accounts: goodput and badput make the wall clock. The account checks
    each place itself, as the journal is checked.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def look(self, snapshot: JobSnapshot) -> None:
        report = snapshot.goodput
        if report is None:
            self._tell("the scheduler has given up its account of goodput")
            return
        parts = (report.goodput_s, *report.badput_s.values())
        total_s = report.places * report.wall_s
        if min(parts) < 0.0 or abs(math.fsum(parts) - total_s) > 1e-6 * max(1.0, total_s):
            self._tell(f"goodput and badput {parts} are not {report.places} x {report.wall_s} s")


def check_goodput(world: World) -> list[str]:
    """After the job: the account is of the samples that the ledger has."""
    snapshot = world.snapshot
    if world.result is None or snapshot is None or snapshot.goodput is None:
        return []
    ledger = read_ledger(world.computers[SCHEDULER].directory / "state" / JOB / "job.db")
    samples = sum(entry.samples for entry in counted(ledger))
    if snapshot.goodput.samples == samples:
        return []
    return [f"goodput is of {snapshot.goodput.samples} samples, the ledger's rounds are of {samples}"]


async def watch_checkpoints(world: World) -> None:
    """Look at them at odd moments, until cancelled: what is announced must be durable already."""
    random = world.random("looks")
    while True:
        await trio.sleep(random.uniform(0.0, 0.4))
        world.problems += check_checkpoints(world)


async def settled(world: World) -> list[str]:
    """After the job: every lease ends, every executor, file and place is given back, no task is left over."""
    if len(world.results) < len(world.schedulers):
        return []
    found: list[str] = []
    with trio.move_on_after(_SETTLE_S):
        while True:
            found = _left_over(world)
            if not found:
                return []
            await trio.sleep(0.5)
    return found


def _left_over(world: World) -> list[str]:
    found: list[str] = []
    for name in world.workers:
        computer = world.computers[name]
        process = computer.process
        if process is None or not process.alive or process.frozen:
            continue
        leases = computer.leases()
        if leases:
            found.append(f"{name} still reserves {leases} leases after the job")
        if computer.executors is not None and computer.executors.running:
            found.append(f"{name} still runs {sorted(computer.executors.running)} after the job")
        work = computer.directory / "work"
        jobs = sorted(path.name for path in (*work.glob("hypha-*"), *work.glob(".hypha-*")))
        if jobs:
            found.append(f"{name} still has the job directories {jobs}")
    for name, computer in world.computers.items():
        process = computer.process
        if process is None or not process.alive or process.frozen or not computer.idle_tasks:
            continue
        node = world.network.nodes.get(name)
        if node is not None and not node.transfers.idle():
            found.append(f"{name} still holds places for transfers")
        more = process.tasks - computer.idle_tasks
        if more.total() > (computer.idle_tasks - process.tasks).total():
            found.append(f"{name} has tasks that it had not before the job: {', '.join(sorted(more))}")
    return found
