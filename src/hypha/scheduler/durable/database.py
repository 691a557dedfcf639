"""The SQLite file below the ledger: its tables, how it is opened, how a full disk is waited out, and what a
resumed job needs of it before it opens its own ledger.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import trio
from msgspec import Struct

from hypha.decoding import decode_json
from hypha.errors import HyphaError
from hypha.runtime import in_thread
from hypha.scheduler.leasing.events import LeaseGained
from hypha.waiting import Reminder

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: SQLite raises the second when the index of its log cannot grow
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
_SPACE_RETRY_S = 1.0

SCHEMA = """
CREATE TABLE IF NOT EXISTS job (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    job_id TEXT NOT NULL, generation INTEGER NOT NULL, state TEXT NOT NULL,
    theta TEXT NOT NULL DEFAULT '', manifest_hash TEXT NOT NULL,
    train TEXT NOT NULL, aggregate TEXT NOT NULL, manifest TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS rounds (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    generation INTEGER NOT NULL, round INTEGER NOT NULL, discarded INTEGER NOT NULL DEFAULT 0,
    samples INTEGER NOT NULL, theta TEXT NOT NULL, entry TEXT NOT NULL,
    UNIQUE (generation, round)
) STRICT;
CREATE TABLE IF NOT EXISTS starts (
    round INTEGER PRIMARY KEY, steps INTEGER NOT NULL, tracker TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS checkpoints (
    round INTEGER PRIMARY KEY, place TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS replicas (
    round INTEGER NOT NULL, peer TEXT NOT NULL, worker TEXT NOT NULL, content TEXT NOT NULL,
    PRIMARY KEY (round, peer)
) STRICT;
CREATE TABLE IF NOT EXISTS pool (
    lease_id TEXT PRIMARY KEY, lease TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS slices (
    one INTEGER PRIMARY KEY CHECK (one = 1), version INTEGER NOT NULL, tracker TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS capacities (
    peer TEXT PRIMARY KEY, capacity REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS failures (
    peer TEXT PRIMARY KEY, times INTEGER NOT NULL, reason TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS published (
    one INTEGER PRIMARY KEY CHECK (one = 1), place TEXT NOT NULL, shown TEXT NOT NULL
) STRICT;
PRAGMA user_version = 2;
"""


def connect(path: Path) -> sqlite3.Connection:
    """Open the database, which is durable at the end of each transaction. Raises :class:`HyphaError`, or
    SQLite's error of a full disk.
    """
    try:
        db = sqlite3.connect(path, check_same_thread=False, timeout=10.0)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
    except (sqlite3.Error, UnicodeDecodeError) as exc:
        if is_full(exc):
            raise
        raise HyphaError(f"the job's ledger {path} cannot be opened: {exc}") from exc
    return db


def is_full(exc: Exception) -> bool:
    """Whether this is SQLite's error of a full disk."""
    return getattr(exc, "sqlite_errorcode", 0) & 0xFF in _FULL


async def with_space(path: Path, call: Callable[[], T], limiter: trio.CapacityLimiter | None = None) -> T:
    """``call`` in a thread, not cancelled half-way, again until the disk is not full any more; the database
    at ``path`` is the one that is logged.
    """
    limiter = limiter or trio.CapacityLimiter(1)
    reminder: Reminder | None = None
    while True:
        try:
            result = await in_thread(call, abandon_on_cancel=False, limiter=limiter)
        except sqlite3.OperationalError as exc:
            if not is_full(exc):
                raise
            reminder = reminder or Reminder(at_once=True)
            if reminder.due():
                text = "The job stands still, as its ledger %s cannot be written (%s): free space on its disk"
                logger.error(text, path, exc)
            await trio.sleep(_SPACE_RETRY_S)
            continue
        if reminder:
            logger.info("The ledger %s can be written again", path)
        return result


class LeftBehind(Struct, frozen=True):
    """What a scheduler that was killed left of a job: the ``leases`` that it held, whether it had applied a
    round, and the hash of the manifest that the job trains on, if it is not done.
    """

    leases: tuple[LeaseGained, ...] = ()
    trained: bool = False
    manifest_hash: str | None = None


async def left_behind(path: Path) -> LeftBehind:
    """By the ledger in ``path``, if there is one. On a full disk not even that can be read: it waits for
    space. Raises :class:`HyphaError`.
    """

    def read() -> LeftBehind:
        if not path.is_file():
            return LeftBehind()
        with closing(connect(path)) as db:
            try:
                leases = db.execute("SELECT lease FROM pool").fetchall()
                rounds = db.execute("SELECT 1 FROM rounds LIMIT 1").fetchall()
                jobs = db.execute("SELECT manifest_hash FROM job WHERE state != 'done'").fetchall()
            except sqlite3.OperationalError as exc:
                if is_full(exc):
                    raise
                return LeftBehind()  # killed before it had tables
        held = tuple(decode_json(lease, LeaseGained) for (lease,) in leases)
        return LeftBehind(held, bool(rounds), jobs[0][0] if jobs else None)

    return await with_space(path, read)
