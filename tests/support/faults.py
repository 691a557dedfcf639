"""What must be true after faults; the faults themselves are :mod:`hypha.cli.chaos.faults`."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from contextlib import closing

import msgspec
from tests.support.system import System

from hypha.cli.chaos.faults import StruckNode, again, asleep, candidates, executors, fail_at, recover, strike
from hypha.messages import LedgerFile, LedgerRound
from hypha.scheduler.data.slices import TrackerState

__all__ = [
    "StruckNode",
    "again",
    "asleep",
    "candidates",
    "check_ledger",
    "counted",
    "durations",
    "executors",
    "fail_at",
    "recover",
    "slowdown_s",
    "strike",
]


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
