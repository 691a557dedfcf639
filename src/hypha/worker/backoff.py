"""Pauses between attempts: doubled each time up to a limit, each drawn from its upper half."""

from __future__ import annotations

from dataclasses import dataclass

from hypha.runtime import chance


@dataclass
class Backoff:
    """``next_s()`` is the next pause; ``reset()`` after a success."""

    first_s: float = 0.25
    longest_s: float = 15.0
    _pause_s: float = 0.0

    def next_s(self) -> float:
        """Seconds to wait before the next attempt."""
        self._pause_s = min(self.longest_s, self._pause_s * 2 or self.first_s)
        return self._pause_s * chance().uniform(0.5, 1.0)

    def reset(self) -> None:
        """Start over with the shortest pause."""
        self._pause_s = 0.0
