"""Ledgers that no scheduler has open: what a resumed job needs before it opens its own, and whole ledgers for
replay, from a ``job.db`` or an exported ``ledger.json``.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import trio

from hypha.decoding import decode, decode_json
from hypha.errors import HyphaError, Undecodable
from hypha.files.staging import write_whole
from hypha.messages import LedgerFile, encode_json
from hypha.scheduler.durable.database import connect, is_full, with_space
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.leasing.leases import LeaseGained


async def held_leases(path: Path) -> list[LeaseGained]:
    """The leases that a scheduler which was killed left in ``path``; none where there is no ledger. On a full
    disk not even that can be read: it waits for space. Raises :class:`HyphaError`.
    """
    rows = await with_space(path, lambda: _rows(path, "SELECT lease FROM pool"), trio.CapacityLimiter(1))
    return [decode_json(row[0], LeaseGained) for row in rows]


async def has_trained(path: Path) -> bool:
    """Whether the job of the ledger in ``path`` has applied a round; waits as :func:`held_leases` does."""
    query = "SELECT 1 FROM rounds LIMIT 1"
    return bool(await with_space(path, lambda: _rows(path, query), trio.CapacityLimiter(1)))


async def known_manifest(path: Path) -> str | None:
    """The hash of the manifest that the job of the ledger in ``path`` trains on, if that is not done; waits
    as :func:`held_leases` does.
    """
    query = "SELECT manifest_hash FROM job WHERE state != 'done'"
    rows = await with_space(path, lambda: _rows(path, query), trio.CapacityLimiter(1))
    return rows[0][0] if rows else None


def _rows(path: Path, query: str) -> list[tuple[str]]:
    if not path.is_file():
        return []
    with closing(connect(path)) as db:
        try:
            return db.execute(query).fetchall()
        except sqlite3.OperationalError as exc:
            if is_full(exc):
                raise
            return []  # killed before it had tables


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


def _read_database(path: Path) -> LedgerFile:
    with closing(connect(path)) as connection:
        ledger = Ledger.__new__(Ledger)
        ledger.path, ledger._db = path, connection
        return ledger.to_file()


def export_ledger(file: LedgerFile, path: Path) -> None:
    """Write ``ledger.json``, whole or not at all."""
    write_whole(path, msgspec.json.format(encode_json(file), indent=1))
