"""BLAKE3 of a file while it is being written, by the writing thread or, where there are cores, by another."""

from __future__ import annotations

import queue
import threading
from types import TracebackType

import blake3


class Hasher:
    """BLAKE3 of what is given in order."""

    def __init__(self) -> None:
        self._hasher = blake3.blake3()

    def __enter__(self) -> Hasher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end here."""

    def update(self, data: bytes | memoryview) -> None:
        self._hasher.update(data)

    def hexdigest(self) -> str:
        """Of all of it; the last call."""
        return self._hasher.hexdigest()


class HasherBeside(Hasher):
    """The same in a thread of its own. What is given must stay as it is until ``hexdigest`` returns."""

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
            self._hasher.update(data)

    def update(self, data: bytes | memoryview) -> None:
        self._queue.put(data)

    def hexdigest(self) -> str:
        self._queue.put(None)
        self._thread.join()
        return self._hasher.hexdigest()
