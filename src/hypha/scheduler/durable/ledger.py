"""The job's ledger in SQLite: what was asked for, every applied round, every checkpoint, and what is under
way: the pool's leases and who trains on which slice.

One transaction a round, durable before the next directive depends on it (WAL, synchronous FULL). Good
enough to replay the run in one process (:class:`hypha.messages.LedgerFile`) and to resume the job. All
methods block: call them in a thread, one at a time (:meth:`Ledger.run` does).
"""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import msgspec
import trio
from msgspec import Struct

from hypha.decoding import decode, decode_json
from hypha.errors import HyphaError, Undecodable
from hypha.files.staging import write_whole
from hypha.messages import (
    AggregateJob,
    CheckpointIndex,
    LedgerFile,
    LedgerRound,
    Manifest,
    PeerRef,
    TrainJob,
    encode_json,
)
from hypha.rules.resources import weighted_capacity
from hypha.scheduler.data.slices import TrackerState
from hypha.scheduler.durable.database import SCHEMA, connect, is_full, with_space
from hypha.scheduler.leasing.events import LeaseGained, TrackRecord

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

#: rounds from which the speed of workers is computed, and how much is kept of why one failed
_RECENT_ROUNDS, _LONGEST_REASON = 200, 500


class Standing(Struct, frozen=True):
    """What a ledger holds about its job; ``state`` is ``running`` or ``done``."""

    job_id: str
    manifest_hash: str
    train: TrainJob
    aggregate: AggregateJob
    generation: int = 0
    state: str = "running"


class RoundStart(Struct, frozen=True):
    """From here a round can be started again; ``place`` holds the checkpoint."""

    round: int
    steps: int
    tracker: TrackerState
    place: str


class Ledger:
    """``path`` is created if it is not there. Raises :class:`HyphaError`, or SQLite's error of a full disk:
    :func:`open_ledger` waits for space.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._limiter = trio.CapacityLimiter(1)
        self._db = connect(path)
        try:
            with self._db:
                self._db.executescript(SCHEMA)
        except sqlite3.Error as exc:
            self._db.close()
            if is_full(exc):
                raise
            raise HyphaError(f"the job's ledger {path} cannot be opened: {exc}") from exc

    async def run(self, call: Callable[Concatenate[Ledger, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``call`` (a method of this class) in a thread; never two at a time; not cancelled half-way.

        While the disk is full it waits for space, and so does all that must not happen before it is written.
        """
        return await with_space(self.path, lambda: call(self, *args, **kwargs), self._limiter)

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._db.close()

    def _write(self, query: str, *values: object) -> None:
        with self._db:
            self._db.execute(query, values)

    def standing(self) -> Standing | None:
        """Which job this is the ledger of; ``None`` in a new one."""
        row = self._db.execute(
            "SELECT job_id, manifest_hash, train, aggregate, generation, state FROM job"
        ).fetchone()
        if row is None:
            return None
        train, aggregate = decode_json(row[2], TrainJob), decode_json(row[3], AggregateJob)
        return Standing(row[0], row[1], train, aggregate, row[4], row[5])

    def open_job(self, job: Standing, manifest: Manifest, tracker: TrackerState) -> None:
        """A new one, which has no generation yet but its first."""
        with self._db:
            self._db.execute(
                "INSERT INTO job (one, job_id, generation, state, manifest_hash, train, aggregate, manifest)"
                " VALUES (1, ?, 0, 'running', ?, ?, ?, ?)",
                (job.job_id, job.manifest_hash, _text(job.train), _text(job.aggregate), _text(manifest)),
            )
            self._start(0, 0, tracker)
            self._set_slices(tracker)

    def begin_generation(self, generation: int, round_: int, tracker: TrackerState) -> None:
        """A later generation starts from ``round_``: what was applied from there on does not
        count any more.
        """
        with self._db:
            self._set_slices(tracker)
            self._db.execute("UPDATE job SET generation = ?, state = 'running'", (generation,))
            self._db.execute("UPDATE rounds SET discarded = 1 WHERE round >= ?", (round_,))
            for table in ("checkpoints", "replicas", "starts"):
                self._db.execute(f"DELETE FROM {table} WHERE round > ?", (round_,))

    def first_theta(self, theta: str) -> None:
        """The hash of theta of round 0, from the parameter server."""
        self._write("UPDATE job SET theta = ?", theta)

    def record(self, entry: LedgerRound, tracker: TrackerState, steps: int) -> None:
        with self._db:
            self._db.execute(
                "INSERT INTO rounds (generation, round, samples, theta, entry) VALUES (?, ?, ?, ?, ?)",
                (entry.generation, entry.round, entry.samples, entry.theta, _text(entry)),
            )
            self._start(entry.round + 1, steps, tracker.unassigned())
            self._set_slices(tracker)
            # only rounds with a checkpoint can be started again, and this one may get one
            self._db.execute(
                "DELETE FROM starts WHERE round > 0 AND round < ? "
                "AND round NOT IN (SELECT round FROM checkpoints)",
                (entry.round - 8,),
            )

    def _start(self, round_: int, steps: int, tracker: TrackerState) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO starts (round, steps, tracker) VALUES (?, ?, ?)",
            (round_, steps, _text(tracker)),
        )

    def keep_slices(self, tracker: TrackerState) -> None:
        """Who trains on which slice now."""
        with self._db:
            self._set_slices(tracker)

    def _set_slices(self, tracker: TrackerState) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO slices (one, version, tracker) VALUES (1, ?, ?)",
            (tracker.version, _text(tracker)),
        )

    def slices(self) -> TrackerState:
        """Who trains on which slice. :class:`HyphaError` when no job was begun."""
        row = self._db.execute("SELECT tracker FROM slices").fetchone()
        if row is None:
            raise HyphaError(f"{self.path} is the ledger of no job")
        return decode_json(row[0], TrackerState)

    def checkpoint(self, round_: int, place: str) -> None:
        """``round_`` can be started from the files at ``place``."""
        self._write("INSERT OR REPLACE INTO checkpoints (round, place) VALUES (?, ?)", round_, place)

    def forget_checkpoint(self, round_: int) -> None:
        with self._db:
            self._db.execute("DELETE FROM checkpoints WHERE round = ?", (round_,))
            self._db.execute("DELETE FROM replicas WHERE round = ?", (round_,))

    def replicated(self, worker: PeerRef, index: CheckpointIndex) -> None:
        query = "INSERT OR REPLACE INTO replicas (round, peer, worker, content) VALUES (?, ?, ?, ?)"
        self._write(query, index.round, worker.peer, _text(worker), _text(index))

    def replicas(self, round_: int | None = None) -> list[tuple[PeerRef, CheckpointIndex]]:
        """Who has a copy of the checkpoint for ``round_`` (of any), newest first."""
        rows = self._db.execute(
            "SELECT worker, content FROM replicas WHERE ?1 IS NULL OR round = ?1 ORDER BY round DESC",
            (round_,),
        ).fetchall()
        return [(decode_json(worker, PeerRef), decode_json(index, CheckpointIndex)) for worker, index in rows]

    def skip_generations(self, count: int) -> None:
        self._write("UPDATE job SET generation = generation + ?", count)

    def copy_to(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        with closing(sqlite3.connect(path)) as copy:
            self._db.backup(copy)

    def starts(self) -> list[RoundStart]:
        """The rounds that can be started again, newest first; round 0 needs no checkpoint."""
        rows = self._db.execute(
            "SELECT starts.round, steps, tracker, COALESCE(place, '') FROM starts"
            " LEFT JOIN checkpoints ON checkpoints.round = starts.round"
            " WHERE place IS NOT NULL OR starts.round = 0 ORDER BY starts.round DESC"
        ).fetchall()
        return [RoundStart(row[0], row[1], decode_json(row[2], TrackerState), row[3]) for row in rows]

    def open_round(self) -> tuple[int, int, str]:
        """The round after the last one that counts, the inner steps before it, and the hash of its theta
        (empty where it was not reported yet).
        """
        round_, steps = self._db.execute("SELECT round, steps FROM starts ORDER BY round DESC").fetchone()
        theta = self.theta_of(round_)
        if not round_:
            (theta,) = self._db.execute("SELECT theta FROM job").fetchone()
        return int(round_), int(steps), str(theta)

    def lease_gained(self, lease: LeaseGained) -> None:
        """This lease is held, so that another scheduler can go on with it if this one is killed."""
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO pool (lease_id, lease) VALUES (?, ?)", (lease.lease_id, _text(lease))
            )
            if lease.kind == "train":
                # what its speed is to be compared with, long after the lease
                self._db.execute(
                    "INSERT OR REPLACE INTO capacities (peer, capacity) VALUES (?, ?)",
                    (lease.worker.peer, weighted_capacity(lease.resources)),
                )

    def lease_ended(self, lease_id: str | None = None) -> None:
        """It is held no more; ``None``: none is."""
        self._write("DELETE FROM pool WHERE ?1 IS NULL OR lease_id = ?1", lease_id)

    def leases(self) -> list[LeaseGained]:
        """What was held, by whichever scheduler wrote this ledger."""
        rows = self._db.execute("SELECT lease FROM pool").fetchall()
        return [decode_json(row[0], LeaseGained) for row in rows]

    def failed(self, peer: str, reason: str) -> None:
        """That worker failed, or was lost: that counts when offers are compared."""
        self._write(
            "INSERT INTO failures (peer, times, reason) VALUES (?, 1, ?)"
            " ON CONFLICT (peer) DO UPDATE SET times = times + 1, reason = excluded.reason",
            peer,
            reason[:_LONGEST_REASON],
        )

    def track_records(self) -> list[TrackRecord]:
        """What was seen of each worker: the newest rounds, and all failures."""
        rows = self._db.execute(
            "SELECT entry FROM rounds WHERE discarded = 0 ORDER BY number DESC LIMIT ?", (_RECENT_ROUNDS,)
        ).fetchall()
        rounds: Counter[str] = Counter()
        samples: Counter[str] = Counter()
        seconds: dict[str, float] = {}
        for entry in _entries(self.path, (text for (text,) in rows)):
            for part in entry.contributors:
                rounds[part.worker] += 1
                samples[part.worker] += part.samples
                seconds[part.worker] = seconds.get(part.worker, 0.0) + max(0.0, entry.duration_s)
        failures = dict(self._db.execute("SELECT peer, times FROM failures").fetchall())
        capacities = dict(self._db.execute("SELECT peer, capacity FROM capacities").fetchall())
        return [
            TrackRecord(
                worker=worker,
                rounds=rounds[worker],
                failures=failures.get(worker, 0),
                samples_per_s=samples[worker] / seconds[worker] if seconds.get(worker) else 0.0,
                capacity=capacities.get(worker, 0.0),
            )
            for worker in sorted(rounds.keys() | failures.keys())
        ]

    def theta_of(self, round_: int) -> str:
        """The hash of theta at the start of ``round_``; empty where only the model tells it (round 0)."""
        row = self._db.execute(
            "SELECT theta FROM rounds WHERE round = ? AND discarded = 0 ORDER BY number DESC", (round_ - 1,)
        ).fetchone()
        return str(row[0]) if row is not None else ""

    def done(self, place: str, shown: str) -> None:
        """The model is published at ``place``, as the configuration names it; ``shown`` is what users see."""
        with self._db:
            self._db.execute("UPDATE job SET state = 'done'")
            self._db.execute(
                "INSERT OR REPLACE INTO published (one, place, shown) VALUES (1, ?, ?)", (place, shown)
            )

    def published(self) -> tuple[str, str] | None:
        """Where the model is (see :meth:`done`); ``None`` where that was not noted."""
        row = self._db.execute("SELECT place, shown FROM published").fetchone()
        return None if row is None else (str(row[0]), str(row[1]))

    def to_file(self) -> LedgerFile:
        """All of it, for replay. :class:`HyphaError` when no job was begun."""
        return _file_of(self._db, self.path)


async def open_ledger(path: Path) -> Ledger:
    """The ledger in ``path``, once there is space for it. Raises :class:`HyphaError`."""
    return await with_space(path, lambda: Ledger(path))


def read_ledger(path: Path) -> LedgerFile:
    """The ledger in ``path``: a ``job.db`` or an exported ``ledger.json``. Raises :class:`HyphaError`."""
    if not path.is_file():
        raise HyphaError(f"there is no ledger at {path}")
    try:
        if path.suffix == ".json":
            return decode_json(path.read_bytes(), LedgerFile)
        # somebody may have sent it, and SQLite's own errors may quote what is no text
        return decode(_read_database, path)
    except (Undecodable, OSError) as exc:
        raise HyphaError(f"{path} is no readable ledger: {exc}") from exc


def export_ledger(file: LedgerFile, path: Path) -> None:
    """Write ``ledger.json``, whole or not at all."""
    write_whole(path, msgspec.json.format(encode_json(file), indent=1))


def _read_database(path: Path) -> LedgerFile:
    with closing(connect(path)) as db:
        return _file_of(db, path)


def _file_of(db: sqlite3.Connection, path: Path) -> LedgerFile:
    row = db.execute("SELECT train, aggregate, manifest, manifest_hash, theta FROM job").fetchone()
    if row is None:
        raise HyphaError(f"{path} is the ledger of no job")
    entries = db.execute("SELECT entry, discarded FROM rounds ORDER BY number").fetchall()
    return LedgerFile(
        job=decode_json(row[0], TrainJob),
        aggregate=decode_json(row[1], AggregateJob),
        manifest=decode_json(row[2], Manifest),
        manifest_hash=row[3],
        theta=row[4],
        rounds=tuple(
            msgspec.structs.replace(entry, discarded=bool(discarded))
            for text, discarded in entries
            for entry in _entries(path, (text,))
        ),
    )


def _entries(path: Path, texts: Iterable[str]) -> Iterator[LedgerRound]:
    """What can be read of them: an odd one, of another version, is logged, and does not stop the job."""
    for text in texts:
        try:
            yield decode_json(text, LedgerRound)
        except Undecodable as exc:
            logger.error("The ledger %s holds a round that cannot be read: %s", path, exc)


def _text(value: Struct) -> str:
    return encode_json(value).decode()
