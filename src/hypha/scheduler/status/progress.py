"""What a job has achieved so far: the rounds that count, its throughput, and its newest checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

from hypha.messages import LedgerRound, UpdateStatistics

#: of the newest round in the mean throughput
_SHARE = 0.3


class Progressed:
    """What was achieved in rounds that count."""

    def __init__(self) -> None:
        self._entries: dict[int, LedgerRound] = {}
        self.samples_per_s = 0.0
        self.checkpoint: int | None = None
        #: when that one became durable, of trio's clock
        self.checkpoint_at: float | None = None

    @property
    def samples(self) -> int:
        """Samples in applied updates."""
        return sum(entry.samples for entry in self._entries.values())

    @property
    def loss(self) -> float | None:
        """Of the newest round."""
        return self._entries[max(self._entries)].loss if self._entries else None

    @property
    def rounds(self) -> Iterable[LedgerRound]:
        """Those that count."""
        return self._entries.values()

    @property
    def updates(self) -> dict[str, UpdateStatistics]:
        """What was measured of the newest round's updates, by worker."""
        newest = self._entries[max(self._entries)].updates if self._entries else ()
        return {one.worker: one for one in newest}

    def add(self, entry: LedgerRound) -> None:
        """A round was applied; or it became more complete."""
        known = entry.round in self._entries
        self._entries[entry.round] = entry
        if not known and entry.duration_s > 0:
            rate = entry.samples / entry.duration_s
            mean = self.samples_per_s
            self.samples_per_s = rate if not mean else mean + _SHARE * (rate - mean)

    def resume(self, entries: Iterable[LedgerRound]) -> None:
        """From an earlier generation."""
        self._entries = {entry.round: entry for entry in entries if not entry.discarded}

    def cut(self, round_: int) -> None:
        """The job goes on from ``round_``: later ones do not count any more."""
        self._entries = {number: entry for number, entry in self._entries.items() if number < round_}
