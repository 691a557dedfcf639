"""The job as its own ledger tells it: whatever is done to the scheduler, it can be read."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import trio

from hypha.cli.chaos.goodput import Applied

_LOOK_S = 0.05


class LedgerFollower:
    """Follows ``path``, a job's ``job.db``, without ever holding it up."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = 0
        #: rounds as they were seen to be applied
        self.applied: list[Applied] = []

    @property
    def round(self) -> int:
        """The open round, as far as was seen."""
        return self.applied[-1].round + 1 if self.applied else 0

    async def follow(self) -> None:
        """Note each applied round when it appears; runs until it is cancelled."""
        while True:
            for number, round_ in self._rows(
                "SELECT number, round FROM rounds WHERE number > ? ORDER BY number", self._last
            ):
                self._last = number
                self.applied.append(Applied(trio.current_time(), round_))
            await trio.sleep(_LOOK_S)

    async def next_round(self, timeout_s: float) -> Applied | None:
        """The next round that is applied; ``None`` when none is by then."""
        known = len(self.applied)
        with trio.move_on_after(timeout_s):
            while True:
                if len(self.applied) > known:
                    return self.applied[known]
                await trio.sleep(_LOOK_S)
        return None

    def samples(self) -> dict[int, int]:
        """Samples of the rounds that count, by round."""
        return dict(self._rows("SELECT round, samples FROM rounds WHERE discarded = 0 ORDER BY number"))

    def generation(self) -> int:
        """The job's generation."""
        return next((number for number, _ in self._rows("SELECT generation, 0 FROM job")), 0)

    def _rows(self, query: str, *values: int) -> list[tuple[int, int]]:
        """Two numbers a row; nothing when the ledger is not there yet, or just being opened."""
        if not self._path.exists():
            return []
        try:
            with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=1.0)) as db:
                return [(int(one), int(other)) for one, other in db.execute(query, values)]
        except sqlite3.OperationalError:
            return []
