"""Streams from a worker to its executor that may be opened late, broken and opened again at no loss.

A :class:`Feed` is one open stream. :class:`Directives` keeps the newest of each directive and sends it
first to whoever opens a stream; :class:`FileArrivals` keeps every file that arrived until the executor has
deleted it. Both are level-triggered: what is repeated after a reconnect does no harm. So a stream that nobody
reads ends when too much waits in it, and an executor that opens it again has lost nothing.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import trio

from hypha.messages import Directive, ReceivedFile, slot_of

T = TypeVar("T")

#: What may come to wait in a stream, beside what it begins with. Ours read at once; there are a few
#: directives a round, and a file of each worker.
MAX_WAITING = 1024
#: and so many bytes of it, as MessagePack: in memory it is several times that
MAX_WAITING_BYTES = 16 << 20
#: Directives that are kept for whoever opens a stream: one of each type, and of ``SendModel`` one for each
#: worker that is joining.
MAX_NEWEST = 256


class Feed(Generic[T]):
    """An open stream: ``first``, then what is put in, in order, until :data:`MAX_WAITING` items or
    :data:`MAX_WAITING_BYTES` more wait.
    """

    def __init__(self, first: Iterable[T] = ()) -> None:
        #: with their sizes; of the first ones nobody asks
        self._items: deque[tuple[T, int]] = deque((item, 0) for item in first)
        self._most = len(self._items) + MAX_WAITING
        self._size = 0
        self._some = trio.Event()
        self._overrun = False

    def put(self, item: T) -> None:
        """Never blocks."""
        size = len(msgspec.msgpack.encode(item))
        if len(self._items) >= self._most or self._size + size > MAX_WAITING_BYTES:
            self._overrun = True
            self._items.clear()
        if not self._overrun:
            self._items.append((item, size))
            self._size += size
        self._some.set()

    async def get(self) -> T:
        """The next item; waits while there is none. A cancelled call takes none. Raises trio.EndOfChannel
        once more was put in than may wait.
        """
        while not self._items:
            if self._overrun:
                raise trio.EndOfChannel
            self._some = trio.Event()
            await self._some.wait()
        item, size = self._items.popleft()
        self._size -= size
        return item


class Directives:
    def __init__(self) -> None:
        self._newest: dict[tuple[str, str], tuple[int, Directive]] = {}
        #: in the order in which they were opened
        self._feeds: dict[Feed[Directive], None] = {}

    def put(self, seq: int, directive: Directive) -> bool:
        """Pass it on, unless one like it with the same or a higher ``seq`` has been here: then False."""
        key = slot_of(directive)
        known = self._newest.pop(key, None)
        if known is not None and known[0] >= seq:
            self._newest[key] = known
            return False
        self._newest[key] = (seq, directive)  # at the end: replayed in the order they came
        if len(self._newest) > MAX_NEWEST:
            del self._newest[next(iter(self._newest))]
        for feed in self._feeds:
            feed.put(directive)
        return True

    @contextmanager
    def open(self) -> Iterator[Feed[Directive]]:
        """A stream of the newest of each, then of what comes."""
        feed = Feed(directive for _, directive in self._newest.values())
        self._feeds[feed] = None
        try:
            yield feed
        finally:
            del self._feeds[feed]


class FileArrivals:
    """Files that came from peers, in ``directory`` (the job's, which their paths are relative to)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: list[ReceivedFile] = []
        self._feeds: dict[Feed[ReceivedFile], frozenset[str]] = {}

    def put(self, file: ReceivedFile) -> None:
        self._files = [*self.waiting(), file]
        for feed, kinds in self._feeds.items():
            if file.meta.kind in kinds:
                feed.put(file)

    def waiting(self) -> list[ReceivedFile]:
        """Files that the executor has not deleted yet."""
        # whatever the executor may have put there: that is asked of the name alone
        return [file for file in self._files if os.path.lexists(self._directory / file.path)]

    @contextmanager
    def open(self, kinds: frozenset[str]) -> Iterator[Feed[ReceivedFile]]:
        """A stream of the files of ``kinds`` that are still there, then of what comes."""
        feed = Feed(file for file in self.waiting() if file.meta.kind in kinds)
        self._feeds[feed] = kinds
        try:
            yield feed
        finally:
            del self._feeds[feed]
