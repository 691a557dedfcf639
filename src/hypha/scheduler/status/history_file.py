"""The history of a job's rounds on disk: ``history.jsonl`` in its state directory, one record a line.

Lines are whole or ignored, the file is bounded, and a disk that is full costs the history and never the job.
What the ledger has of a round takes precedence over what is here, and rounds that only the ledger knows are
there, too: they have no spans.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec
import trio

from hypha.decoding import decode_json
from hypha.errors import HyphaError, Undecodable
from hypha.files.staging import write_whole
from hypha.messages import LedgerFile
from hypha.runtime import in_thread
from hypha.scheduler.durable.ledger_files import read_ledger
from hypha.scheduler.status.history import History
from hypha.scheduler.status.round_record import RoundRecord, from_ledger, with_numbers

logger = logging.getLogger("hypha.scheduler")

FILE = "history.jsonl"
#: a larger file is written anew, with its newer half
MAX_BYTES = 16 << 20
_LAST_SAVE_S = 0.5


async def keep_history(history: History, directory: Path) -> None:
    """Read what earlier schedulers of the job left in its state ``directory``, then append every record that
    becomes complete; until cancelled, and what is left then is written quickly. What goes wrong is logged
    once, and ends this alone.
    """
    store = HistoryFile(directory / FILE)
    try:
        try:
            await _follow(history, directory, store)
        finally:
            with trio.move_on_after(_LAST_SAVE_S, shield=True):
                await in_thread(store.append, history.unsaved(), abandon_on_cancel=True)
    except Exception:
        # a file for people must not end a job
        logger.exception("The history of rounds is not kept any more in %s.", directory / FILE)


async def _follow(history: History, directory: Path, store: HistoryFile) -> None:
    seen, restored = 0, False
    while True:
        seen = await history.finished.wait(seen)
        if not restored and history.job is not None:
            restored = True
            job_id, generation = history.job
            if generation:
                history.restore(await in_thread(_restorable, history, directory, job_id))
        await in_thread(store.append, history.unsaved())


def _restorable(history: History, directory: Path, job_id: str) -> list[RoundRecord]:
    try:
        records = read_history(directory)
    except HyphaError as exc:
        logger.warning("Rounds of the job's earlier schedulers are not shown: %s", exc)
        return []
    return [history.cleaned(record) for record in records if record.job_id == job_id]


class HistoryFile:
    """Appends records to ``path``, never raises. Blocks: call it in a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failing = False

    def append(self, records: Iterable[RoundRecord]) -> None:
        """Whole lines; what cannot be written is lost, and that is logged once."""
        try:
            # text that is no Unicode raises ValueError
            lines = b"".join(msgspec.json.encode(record) + b"\n" for record in records)
            if not lines:
                return
            with self._path.open("ab+") as file:
                if file.tell():
                    file.seek(-1, 2)
                    if file.read(1) != b"\n":
                        # the scheduler before was killed, or its disk was full
                        lines = b"\n" + lines
                file.write(lines)
            if self._path.stat().st_size > MAX_BYTES:
                self._shorten()
        except (OSError, ValueError) as exc:
            if not self._failing:
                logger.warning("The history of rounds is not kept in %s for now: %s", self._path, exc)
            self._failing = True
        else:
            if self._failing:
                logger.info("The history of rounds is kept in %s again.", self._path)
            self._failing = False

    def _shorten(self) -> None:
        lines = self._path.read_bytes().splitlines(keepends=True)
        write_whole(self._path, b"".join(lines[len(lines) // 2 :]))


def read_history(directory: Path) -> list[RoundRecord]:
    """All rounds of the job in the state ``directory``, in the order in which they happened. Blocks. Raises
    :class:`HyphaError` where there is no ledger.
    """
    database = directory / "job.db"
    ledger = read_ledger(database if database.exists() else directory / "ledger.json")
    return merged(ledger, _read_lines(directory / FILE))


def merged(ledger: LedgerFile, records: Iterable[RoundRecord]) -> list[RoundRecord]:
    """What the ledger has, with the spans of ``records``, and those of its job that it does not know: rounds
    that were cut short. A round that the ledger does not have was not applied, whatever a record has.
    """
    job_id = ledger.job.job_id
    known = {record.key: record for record in records if record.job_id == job_id}
    found: dict[tuple[int, int], RoundRecord] = {
        key: record for key, record in known.items() if not record.applied
    }
    for entry in ledger.rounds:
        key = entry.generation, entry.round
        record = known.get(key)
        if record is None:
            found[key] = from_ledger(entry, job_id)
        else:
            found[key] = msgspec.structs.replace(with_numbers(record, entry), discarded=entry.discarded)
    return _placed([found[key] for key in sorted(found)])


def _placed(records: list[RoundRecord]) -> list[RoundRecord]:
    """Rounds whose beginning nobody noted begin where the one before ended, or end where the next begins."""
    placed: list[RoundRecord] = []
    for record in records:
        if not record.began and placed and placed[-1].began:
            record = msgspec.structs.replace(record, began=placed[-1].began + placed[-1].length_s)
        placed.append(record)
    for index in range(len(placed) - 2, -1, -1):
        if not placed[index].began and placed[index + 1].began:
            began = placed[index + 1].began - placed[index].length_s
            placed[index] = msgspec.structs.replace(placed[index], began=began)
    return placed


def _read_lines(path: Path) -> list[RoundRecord]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            records.append(decode_json(line, RoundRecord))
        except Undecodable:
            # whoever wrote it was killed meanwhile, or the disk has spoilt it: it may not even be UTF-8
            continue
    return records
