"""When faults strike (round and phase), and what must be true after them; the faults themselves are
:mod:`hypha.cli.chaos.faults`.

``await fail_at(TargetJob(network, scheduler), "worker", 2, "training", "kill")`` waits for that moment of the
running job and strikes a worker that trains but does not host the parameter server.
"""

from __future__ import annotations

import signal
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Literal

import msgspec
import trio
from tests.support.system import System

from hypha.cli.chaos.faults import (
    How,
    Role,
    StruckNode,
    TargetJob,
    again,
    candidates,
    executors,
    recover,
    send_signal,
    strike,
    workers_of,
)
from hypha.cli.local.children import Child
from hypha.cli.local.network import JOB_S
from hypha.messages import LedgerFile, LedgerRound
from hypha.scheduler.data.slices import TrackerState
from hypha.scheduler.status.snapshot import JobSnapshot

__all__ = [
    "Phase",
    "StruckNode",
    "again",
    "asleep",
    "candidates",
    "check_ledger",
    "counted",
    "durations",
    "executors",
    "fail_at",
    "phase_reached",
    "recover",
    "slowdown_s",
    "strike",
]


Phase = Literal["training", "scheduled", "updating", "broadcasting", "last-round"]
#: between two looks at a log: theta of a small model is under way for a few milliseconds only
_LOOK_S = 0.003
#: members that are not waited for
_AWAY = ("unreachable", "loading")


async def fail_at(
    job: TargetJob,
    role: Role,
    round_: int,
    phase: Phase = "training",
    how: How = "kill",
    name: str | None = None,
) -> StruckNode:
    """Strike ``role`` in that phase of round ``round_`` (from 0), or of a later one if it was over too
    soon to be seen. ``name`` chooses among several nodes of a role.
    """
    return strike(job, role, how, await phase_reached(job, role, round_, phase), name)


async def phase_reached(job: TargetJob, role: Role, round_: int, phase: Phase = "training") -> JobSnapshot:
    """The job in that phase of that round, or of a later one."""
    if phase == "updating":
        return await _updating(job, role, round_)
    if phase == "broadcasting":
        before = await _trained(job, round_)
        # the snapshot is a little old, so it may be the next round that ends first
        await _written(job.scheduler, " was applied: ", JOB_S)
        return before
    if phase == "scheduled":
        return await job.network.reached(
            job.scheduler, lambda seen: seen.round >= round_ and seen.phase == "scheduled"
        )
    if phase == "last-round":
        return await _trained(job, None)
    return await _trained(job, round_)


@contextmanager
def asleep(*pids: int) -> Iterator[None]:
    """These processes do nothing meanwhile."""
    send_signal(pids, signal.SIGSTOP)
    try:
        yield
    finally:
        send_signal(pids, signal.SIGCONT)


def counted(ledger: LedgerFile) -> list[LedgerRound]:
    """The rounds that make up the trained model."""
    return [entry for entry in ledger.rounds if not entry.discarded]


def check_ledger(system: System, job: str, rounds: int) -> LedgerFile:
    """Every round was applied once, and every slice that counts as used was used, all of it; epochs that
    are over have only such slices.
    """
    path, ledger = system.ledger(job)
    entries = counted(ledger)
    assert [entry.round for entry in entries] == list(range(rounds))
    used: dict[tuple[int, int], set[int]] = defaultdict(set)
    for entry in entries:
        for part in entry.contributors:
            assert part.samples == sum(span.stop - span.start for span in part.ranges)
            for span in part.ranges:
                used[span.epoch, span.slice].update(range(span.start, span.stop))
    with closing(sqlite3.connect(path.with_name("job.db"))) as db:
        (text,) = db.execute("SELECT tracker FROM starts ORDER BY round DESC LIMIT 1").fetchone()
    tracker = msgspec.json.decode(text, type=TrackerState)
    unfinished = {epoch.epoch: epoch.used for epoch in tracker.epochs}
    assert len(unfinished) < tracker.next_epoch, "no epoch was finished at all"
    for epoch in range(tracker.next_epoch):
        for index in unfinished.get(epoch, range(len(tracker.samples))):
            missing = set(range(tracker.samples[index])) - used[epoch, index]
            assert not missing, f"slice {index} of epoch {epoch} was never used: rows {sorted(missing)}"
    return ledger


def durations(ledger: LedgerFile) -> str:
    """The rounds' durations and contributors, to be read."""
    return "\n".join(
        f"{'x' if entry.discarded else ' '} generation {entry.generation} round {entry.round}: "
        f"{entry.duration_s:5.2f} s, {entry.samples} samples of {len(entry.contributors)}"
        for entry in ledger.rounds
    )


def slowdown_s(ledger: LedgerFile, round_: int) -> float:
    """How much longer that round took than the longer of its neighbours."""
    entries = {entry.round: entry for entry in counted(ledger)}
    near = [entries[number].duration_s for number in (round_ - 1, round_ + 1) if number in entries]
    return entries[round_].duration_s - max(near)


async def _trained(job: TargetJob, round_: int | None) -> JobSnapshot:
    """Every worker of the round has trained a little; ``None`` is the last round."""

    def holds(seen: JobSnapshot) -> bool:
        wanted = seen.rounds - 1 if round_ is None else round_
        return (
            seen.round >= wanted
            and seen.phase in ("training", "scheduled")
            and any(worker.batches for worker in seen.workers)
            and all(worker.batches or worker.state in _AWAY for worker in seen.workers)
        )

    return await job.network.reached(job.scheduler, holds)


async def _updating(job: TargetJob, role: Role, round_: int) -> JobSnapshot:
    """One update is in, another held back: a worker that is not the victim sleeps meanwhile. It is chosen
    again when rounds go by without it, as its executor may just have been replaced.
    """
    while True:
        seen = await _trained(job, round_)
        bystander = _bystander(job, role, seen)
        if bystander is None:
            await trio.sleep(_LOOK_S)
            continue

        def shown(now: JobSnapshot, passed: int = seen.round + 2) -> bool:
            return now.phase == "updating" or now.round >= passed

        with asleep(bystander):
            now = await job.network.reached(job.scheduler, shown)
        if now.phase == "updating":
            return now


def _bystander(job: TargetJob, role: Role, seen: JobSnapshot) -> int | None:
    """The executor of somebody who trains and is not the victim, if there is one."""
    [victim, *_] = candidates(job, role, seen)
    trainers = workers_of(job.network, {worker.peer for worker in seen.workers if worker.batches})
    pids = (pid for child in trainers if child is not victim for pid in executors(child, "training"))
    return next(pids, None)


async def _written(child: Child, text: str, timeout_s: float) -> None:
    """Return within milliseconds of ``text`` being added to its log."""
    at, tail = child.log.stat().st_size, b""
    with trio.fail_after(timeout_s), child.log.open("rb") as log:
        log.seek(at)
        while text.encode() not in tail:
            await trio.sleep(_LOOK_S)
            tail = tail[-len(text) :] + log.read()
