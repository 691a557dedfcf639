"""Streams from a worker to its executor that may be opened late, broken and opened again at no loss.

A :class:`Feed` is one open stream. :class:`Directives` keeps the newest of each directive and says it
first to whoever opens a stream; :class:`Arrivals` keeps every file that arrived until the executor has
deleted it. Both are level-triggered: what is repeated after a reconnect does no harm.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import trio

from hypha.messages import Directive, ReceivedFile, SendModel

T = TypeVar("T")


class Feed(Generic[T]):
    """An open stream: what is put in comes out, in order."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._some = trio.Event()

    def put(self, item: T) -> None:
        """Never blocks."""
        self._items.append(item)
        self._some.set()

    async def get(self) -> T:
        """The next item; waits while there is none. A cancelled call takes none."""
        while not self._items:
            self._some = trio.Event()
            await self._some.wait()
        return self._items.popleft()


def _key(directive: Directive) -> tuple[str, str]:
    """What a newer directive replaces. Each joiner needs theta, so ``SendModel`` counts per receiver."""
    return (type(directive).__name__, directive.to.peer if isinstance(directive, SendModel) else "")


class Directives:
    """The directives of one executor."""

    def __init__(self) -> None:
        self._newest: dict[tuple[str, str], tuple[int, Directive]] = {}
        #: in the order in which they were opened
        self._feeds: dict[Feed[Directive], None] = {}

    def put(self, seq: int, directive: Directive) -> bool:
        """Pass it on, unless one like it with the same or a higher ``seq`` has been here: then False."""
        key = _key(directive)
        known = self._newest.pop(key, None)
        if known is not None and known[0] >= seq:
            self._newest[key] = known
            return False
        self._newest[key] = (seq, directive)  # at the end: replayed in the order they came
        for feed in self._feeds:
            feed.put(directive)
        return True

    @contextmanager
    def open(self) -> Iterator[Feed[Directive]]:
        """A stream of the newest of each, then of what comes."""
        feed: Feed[Directive] = Feed()
        for _, directive in self._newest.values():
            feed.put(directive)
        self._feeds[feed] = None
        try:
            yield feed
        finally:
            del self._feeds[feed]


class Arrivals:
    """Files that came from peers, in ``directory`` (the job's, which their paths are relative to)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: list[ReceivedFile] = []
        self._feeds: dict[Feed[ReceivedFile], frozenset[str]] = {}

    def put(self, file: ReceivedFile) -> None:
        """``file`` has arrived."""
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
        feed: Feed[ReceivedFile] = Feed()
        for file in self.waiting():
            if file.meta.kind in kinds:
                feed.put(file)
        self._feeds[feed] = kinds
        try:
            yield feed
        finally:
            del self._feeds[feed]
