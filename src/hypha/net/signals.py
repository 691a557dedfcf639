"""Small trio-friendly signals."""

from __future__ import annotations

import trio


class Changes:
    """Counts changes; whoever waits says up to where it has seen them, so none is missed.

    ``seen = await changes.wait(seen)`` returns at once when something changed since.
    """

    def __init__(self) -> None:
        self.count = 0
        self._next = trio.Event()

    def note(self) -> None:
        """One more change."""
        self.count += 1
        self._next.set()
        self._next = trio.Event()

    async def wait(self, seen: int | None = None) -> int:
        """Wait for a change after ``seen`` (default: after now); returns the present count."""
        if seen is None:
            seen = self.count
        while self.count <= seen:
            await self._next.wait()
        return self.count
