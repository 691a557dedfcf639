"""Hashes of a file while it is being written, by the writing thread or, where there are cores, by another."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from types import TracebackType

import blake3
import xxhash


@dataclass(frozen=True)
class Digests:
    """Of a file, in hex: BLAKE3 (empty where nobody needs it) and XXH3 of 128 bits."""

    blake3: str
    xxh3: str


class Hasher:
    """Hashes of what is given in order; ``quick``: XXH3 alone."""

    def __init__(self, quick: bool = False) -> None:
        self._strong = None if quick else blake3.blake3()
        self._quick = xxhash.xxh3_128()

    def __enter__(self) -> Hasher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end here."""

    def update(self, data: bytes | memoryview) -> None:
        self._quick.update(data)
        if self._strong is not None:
            self._strong.update(data)

    def digests(self) -> Digests:
        """Of all of it; the last call."""
        return Digests("" if self._strong is None else self._strong.hexdigest(), self._quick.hexdigest())


class HasherBeside(Hasher):
    """The same in a thread of its own. What is given must stay as it is until ``digests`` returns."""

    def __init__(self) -> None:
        super().__init__()
        self._queue: queue.SimpleQueue[bytes | memoryview | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="hash", daemon=True)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            super().update(data)

    def update(self, data: bytes | memoryview) -> None:
        self._queue.put(data)

    def digests(self) -> Digests:
        self._queue.put(None)
        self._thread.join()
        return super().digests()
