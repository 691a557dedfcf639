"""What a scheduler has seen of workers itself: rounds that hold their updates, how fast they were, how often
they failed. An offer is what a worker claims; this is what came of it, and counts in the choice among
offers. Pure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from msgspec import Struct
from msgspec.structs import replace

#: before anything is known of a worker, it is as good as one of which so many rounds went well, and one did
#: not
_GOOD, _BAD = 2.0, 1.0
#: a failure costs more than a round is worth
_FAILURE = 2.0
#: a measured speed counts for at most so many times what is usual for the capacity, and at least one part of
#: that
_FASTEST = 10.0
#: workers that are remembered; those that were seen longest ago are forgotten
_REMEMBERED = 10_000


class TrackRecord(Struct, frozen=True, tag=True):
    """Of ``worker``: ``rounds`` hold its updates, of ``samples_per_s`` in the mean; so many ``failures``.
    ``capacity`` is the weighted one of its last lease, 0.0 where it is not known.
    """

    worker: str
    rounds: int = 0
    failures: int = 0
    samples_per_s: float = 0.0
    capacity: float = 0.0


class Standings:
    """Of all workers, by PeerID."""

    def __init__(self) -> None:
        self._seen: dict[str, TrackRecord] = {}

    def _of(self, worker: str) -> TrackRecord:
        return self._seen.get(worker) or TrackRecord(worker)

    def _note(self, record: TrackRecord) -> None:
        """It is the one that was seen last."""
        self._seen.pop(record.worker, None)
        self._seen[record.worker] = record
        while len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]

    def know(self, record: TrackRecord, most: float = math.inf) -> None:
        """What a ledger has of a worker. Of its capacity the job can use ``most``."""
        # it may be held already, under a lease of which more is known
        capacity = self._of(record.worker).capacity or min(record.capacity, most)
        self._note(replace(record, capacity=capacity))

    def took(self, worker: str, capacity: float) -> None:
        """It trains under a lease of that weighted capacity."""
        self._note(replace(self._of(worker), capacity=capacity))

    def failed(self, worker: str) -> int:
        """Once more; how often in all."""
        seen = self._of(worker)
        self._note(replace(seen, failures=seen.failures + 1))
        return seen.failures + 1

    def worked(self, speeds: Iterable[tuple[str, float]]) -> None:
        """A round was applied, with updates of these workers, at so many samples a second each."""
        for worker, samples_per_s in speeds:
            seen = self._of(worker)
            rounds = seen.rounds + 1
            mean = seen.samples_per_s + (samples_per_s - seen.samples_per_s) / min(rounds, 10)
            self._note(replace(seen, rounds=rounds, samples_per_s=mean))

    def reliability(self, worker: str) -> float:
        """The share of rounds that can be expected to go well there, over 0 and under 1."""
        seen = self._of(worker)
        return (seen.rounds + _GOOD) / (seen.rounds + _GOOD + _BAD + _FAILURE * seen.failures)

    def pace(self, worker: str) -> float:
        """How fast it was for its capacity, beside what is usual; 1.0 where that is not known."""
        seen = self._of(worker)
        if not (seen.samples_per_s > 0 and seen.capacity > 0):
            return 1.0
        usual = statistics.median(
            one.samples_per_s / one.capacity
            for one in self._seen.values()
            if one.samples_per_s > 0 and one.capacity > 0
        )
        return min(_FASTEST, max(1.0 / _FASTEST, seen.samples_per_s / seen.capacity / usual))
