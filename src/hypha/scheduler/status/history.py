"""What every round of a job was spent on: a listener of the journal, for people who come late; and its file.

:class:`History` is called with every entry that the round machine notes, and keeps one :class:`RoundRecord` a
round: when each worker trained, sent its update and waited, what the parameter server did, and what went
wrong. The newest rounds keep their spans in memory, older ones their numbers, and the oldest are dropped. It
decides nothing, and what goes wrong in it is logged.

On disk it is ``history.jsonl`` in the job's state directory, one record a line. Lines are whole or ignored,
the file is bounded, and a disk that is full costs the history and never the job. What the ledger has of a
round takes precedence over what is here, and rounds that only the ledger knows are there, too, without spans.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import trio

from hypha.decoding import decode_json
from hypha.errors import HyphaError, Undecodable
from hypha.files.staging import write_whole
from hypha.journal import JournalEntry
from hypha.messages import LedgerFile
from hypha.node import Changes
from hypha.runtime import in_thread, wall_time
from hypha.scheduler.durable.ledger import read_ledger
from hypha.scheduler.rounds.events import GenerationBegan, Record
from hypha.scheduler.rounds.machine import NAME
from hypha.scheduler.status.round_record import (
    Key,
    OpenRound,
    Redact,
    RoundRecord,
    cleaned,
    rounded,
    with_numbers,
    without_spans,
)

logger = logging.getLogger("hypha.scheduler")

#: records in memory; and how many parts of workers all of them together have at most
KEPT, KEPT_PARTS = 2000, 20_000
#: rounds whose spans stay in memory
DETAILED = 50
FILE = "history.jsonl"
#: a larger file is written anew, with its newer half
MAX_BYTES = 16 << 20
_LAST_SAVE_S = 0.5


class History:
    """Records of one job's rounds; :meth:`note` is a listener of the job's journal. ``changes`` counts the
    records that became complete, or more complete. ``redact`` takes secrets out of what peers report and
    errors quote, before any of it is kept.
    """

    def __init__(self, wall: Callable[[], float] = wall_time, redact: Redact | None = None) -> None:
        self._wall = wall
        self._redact = redact
        self._records: dict[Key, RoundRecord] = {}
        self._changed: dict[Key, int] = {}
        self._open: OpenRound | None = None
        self._generation: GenerationBegan | None = None
        #: how often all records were replaced
        self.replaced = 0
        self.changes = Changes()

    @property
    def records(self) -> tuple[RoundRecord, ...]:
        """All that are complete, in the order in which they happened."""
        return tuple(self._records.values())

    @property
    def job(self) -> tuple[str, int] | None:
        """The job's id and its generation; None before its first generation has begun."""
        start = None if self._generation is None else self._generation.start
        return None if start is None else (start.job_id, start.generation)

    def since(self, count: int) -> tuple[RoundRecord, ...]:
        """Those of this scheduler that have changed after :attr:`changes` had counted so many."""
        return tuple(self._records[key] for key, changed in self._changed.items() if changed > count)

    def open_round(self, now: float) -> RoundRecord | None:
        """The record of the round that is under way; ``now`` is of the machine's clock."""
        return None if self._open is None else self._open.record(now)

    def cleaned(self, record: RoundRecord) -> RoundRecord:
        """An earlier scheduler's ``record``, which may have known other secrets, or none. Works in any
        thread: there may be many.
        """
        if not record.faults:
            return record
        faults = tuple(cleaned(fault, self._redact) for fault in record.faults)
        return msgspec.structs.replace(record, faults=faults)

    def restore(self, records: Iterable[RoundRecord]) -> None:
        """Earlier schedulers' records, before those of this one; see :meth:`cleaned`."""
        merged = {record.key: record for record in records}
        merged.update(self._records)
        self._records = dict(sorted(merged.items()))
        self.replaced += 1
        self._trim()

    def note(self, entry: JournalEntry) -> None:
        if entry.machine != NAME:
            return
        event = entry.event
        if isinstance(event, GenerationBegan):
            self._begin_generation(event)
            return
        if self._open is None and self._generation is not None and _goes_on(entry):
            # the first entry of a generation has no time, so the record begins with the second
            start = self._generation.start
            self._open = OpenRound(
                start.job_id, start.generation, start.round, entry.at_s, self._wall(), redact=self._redact
            )
        opened = self._open
        if opened is None:
            return
        opened.note(entry)
        applied = [action.entry for action in entry.actions if isinstance(action, Record)]
        if applied:
            now, following = entry.at_s, applied[-1].round + 1
            opened.server_track.switch("broadcast", now)
            self._put(with_numbers(opened.record(now), applied[-1]))
            self._open = opened.followed(following, now, self._wall()) if _goes_on(entry) else None

    def _begin_generation(self, event: GenerationBegan) -> None:
        if self._open is not None:
            # cut short: what is known of it is worth a look, as here something went wrong
            self._put(self._open.record())
        self._open, self._generation = None, event
        # whoever reads earlier schedulers' records knows now whose they are
        self.changes.note()
        for record in self.records:
            if record.round >= event.start.round and record.applied and not record.discarded:
                self._put(msgspec.structs.replace(record, discarded=True))

    def _put(self, record: RoundRecord) -> None:
        self._records[record.key] = record
        self.changes.note()
        self._changed.pop(record.key, None)
        self._changed[record.key] = self.changes.count
        self._trim()

    def _trim(self) -> None:
        parts = sum(len(record.workers) for record in self._records.values())
        while len(self._records) > 1 and (len(self._records) > KEPT or parts > KEPT_PARTS):
            key = next(iter(self._records))
            parts -= len(self._records.pop(key).workers)
            self._changed.pop(key, None)
        for key in list(self._records)[:-DETAILED]:
            record = self._records[key]
            if record.server_spans or any(worker.spans for worker in record.workers):
                self._records[key] = without_spans(record)


def _goes_on(entry: JournalEntry) -> bool:
    state = entry.state
    return not isinstance(state, str) and state.get("phase") not in ("exporting", "done", "failed")


async def keep_history(history: History, directory: Path) -> None:
    """Read what earlier schedulers of the job left in its state ``directory``, then append every record that
    becomes complete; until cancelled, and what is left then is written quickly. What goes wrong is logged
    once, and ends this alone.
    """
    store, saved, restored = HistoryFile(directory / FILE), 0, False
    try:
        try:
            while True:
                await history.changes.wait(saved)
                if not restored and history.job is not None:
                    restored = True
                    job_id, generation = history.job
                    if generation:
                        history.restore(await in_thread(_restorable, history, directory, job_id))
                records, saved = history.since(saved), history.changes.count
                await in_thread(store.append, records)
        finally:
            with trio.move_on_after(_LAST_SAVE_S, shield=True):
                await in_thread(store.append, history.since(saved), abandon_on_cancel=True)
    except Exception:
        # a file for people must not end a job
        logger.exception("The history of rounds is not kept any more in %s.", directory / FILE)


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
    found = {key: record for key, record in known.items() if not record.applied}
    for entry in ledger.rounds:
        key = entry.generation, entry.round
        record = known.get(key)
        if record is None:
            record = RoundRecord(job_id, *key, began=0.0, length_s=rounded(entry.duration_s))
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
