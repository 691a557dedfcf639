"""What happened in the pure machines of one process: events in, actions out, in order.

A machine that is given a :class:`Journal` notes every event it handled, the actions that it returned and
its state afterwards. The newest entries stay in memory, so that a job that fails can leave them behind; all
of them go to a file where one is named. The first entry of a machine holds what it was made from, so a
journal that is whole can be run through the machines once more (``hypha replay --journal``). An entry has
one encoding only: the same run gives the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec

from hypha.files.staging import StagedFile

logger = logging.getLogger("hypha.journal")

#: entries kept in memory
KEPT = 2000
#: And so many bytes of them, as MessagePack: events hold what peers have sent.
KEPT_BYTES = 16 << 20

State = Mapping[str, object] | str


@dataclass(frozen=True)
class JournalEntry:
    """``machine`` handled ``event`` at ``at_s`` (of the node's monotonic clock), returned ``actions`` and is
    in ``state`` since then. ``drawn``: what the machine got from chance meanwhile, in order. The first entry
    of a machine has what it was made from as its event, at 0 where it was given no time.
    """

    number: int
    at_s: float
    machine: str
    event: object
    actions: tuple[object, ...]
    state: State
    drawn: tuple[object, ...] = ()

    def line(self) -> bytes:
        """One line of JSON, always the same for the same entry."""
        return encode_line(self)


class Journal:
    """Entries of all machines that share it. ``checked``: machines assert their invariants after every event
    (tests, simulation). ``listeners`` are called with every entry, at once.

    With ``file`` every entry is appended there at once. A file that cannot be written any more is given up
    with an error in the log: it must not end the job.
    """

    def __init__(self, *, kept: int = KEPT, file: Path | None = None, checked: bool = False) -> None:
        self.entries: deque[JournalEntry] = deque()
        self._kept = kept
        self._sizes: deque[int] = deque()
        self._size = 0
        self.listeners: list[Callable[[JournalEntry], None]] = []
        self.checked = checked
        self._number = 0
        self._path = file
        # raises OSError where the file cannot be made: whoever names one wants it
        self._sink: FileIO | None = None if file is None else _appendable(file)

    def note(
        self,
        machine: str,
        now: float,
        event: object,
        actions: Sequence[object],
        state: State,
        drawn: Sequence[object] = (),
    ) -> None:
        """``machine`` handled ``event``; never raises for what cannot be written."""
        entry = JournalEntry(self._number, now, machine, event, tuple(actions), state, tuple(drawn))
        self._number += 1
        try:
            # as MessagePack; of what has none, a guess
            said = (entry.event, entry.actions, entry.state, entry.drawn)
            size = len(msgspec.msgpack.encode(said, enc_hook=_hook))
        except (NotImplementedError, TypeError, ValueError, OverflowError):
            size = 1024
        self.entries.append(entry)
        self._sizes.append(size)
        self._size += size
        while len(self.entries) > self._kept or self._size > KEPT_BYTES:
            self.entries.popleft()
            self._size -= self._sizes.popleft()
        if self._sink is not None:
            self._write(self._sink, entry)
        for listener in list(self.listeners):
            try:
                listener(entry)
            except Exception:  # who only looks on must not end the job
                if self.checked:
                    raise
                logger.exception("A listener of the journal failed, and is told nothing any more.")
                self.leave(listener)

    def leave(self, listener: Callable[[JournalEntry], None]) -> None:
        """``listener`` is told nothing any more; it may have failed, and been left out, before."""
        if listener in self.listeners:
            self.listeners.remove(listener)

    def _write(self, sink: FileIO, entry: JournalEntry) -> None:
        try:
            left = memoryview(entry.line() + b"\n")
            while left:
                left = left[sink.write(left) :]
        except OSError as exc:
            logger.error("The journal %s cannot be written any more: %s", self._path, exc)
            self.close()

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._sink is not None:
            self._sink.close()
            self._sink = None


def _appendable(path: Path) -> FileIO:
    """``path``, at the beginning of a line: whoever wrote there before may have been killed meanwhile. What
    is written is the system's at once, so a killed process leaves all that it decided.
    """
    file = FileIO(path, "a+")
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def write_entries(path: Path, about: object, entries: Sequence[JournalEntry]) -> None:
    """Write ``entries``, after a line with what they are ``about``; whole or not at all. Blocks; raises
    OSError.
    """
    with StagedFile(path) as staged:
        staged.file.write(encode_line({"about": about}) + b"\n")
        for entry in entries:
            staged.file.write(entry.line() + b"\n")
        staged.publish()


def plain(value: object) -> Any:
    """``value`` as dicts, lists and scalars, sets in order, errors by name and text."""
    return msgspec.to_builtins(value, order="deterministic", enc_hook=_hook)


def encode_line(value: object) -> bytes:
    """One line of JSON, for any value of messages, events and actions. Floats stay exact; what is no number
    is written as Python's ``json`` does (``NaN``, ``Infinity``).
    """
    return json.dumps(plain(value), ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


def _hook(value: object) -> object:
    if isinstance(value, Exception):
        return {"error": type(value).__name__, "text": str(value)}
    raise NotImplementedError(f"{type(value).__name__} has no place in a journal")
