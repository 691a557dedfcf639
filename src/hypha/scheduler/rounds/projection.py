"""When everybody should synchronise: batch times are learnt, the rest of the round is projected.

Given how many samples are still wanted, :func:`project` gives every worker its number of batches in the
round such that the wanted samples are reached and all arrive at (nearly) the same moment. All times are
seconds relative to now and nothing depends on their scale: rounds of 0.1 s and of hours are planned
alike. Pure; O(workers^2), about a millisecond for a hundred of them.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

#: seconds a batch: no step of any model is quicker, and none that is awaited takes longer
_LEAST_BATCH_S, _MOST_BATCH_S = 1e-4, 1e7
#: of what was learnt of batch times so much is left after one more: half after eight
_DECAY = 0.5 ** (1.0 / 8.0)
#: Nobody is to wait for a larger share of a round than this; synchronising takes about as much again.
_BEARABLE = 0.02
#: guards against calling 2.9999999 finished batches two
_SLACK = 1e-9


@dataclass
class BatchTime:
    """Exponentially weighted mean of the seconds a batch takes, from counts since the round's start.

    Counts may repeat or arrive out of order: only growth is measured. A change of speed is followed
    with a half-life of about eight batches, whatever the report interval is.
    """

    #: seconds per batch; ``None`` before the first one
    value_s: float | None = None
    _weight: float = 0.0
    _batches: int = 0
    _busy_s: float = 0.0

    def start_round(self) -> None:
        """Counts begin at zero again; what was learnt stays."""
        self._batches = 0
        self._busy_s = 0.0

    def scale(self, factor: float) -> None:
        """Batches are ``factor`` times as large: what was learnt of them is worth little."""
        if self.value_s is not None:
            self.value_s *= factor
        self._weight = min(self._weight, 1.0 - _DECAY)

    def update(self, batches: int, busy_s: float) -> None:
        """``batches`` took ``busy_s`` seconds since the round's start."""
        new, seconds = batches - self._batches, busy_s - self._busy_s
        if new <= 0 or seconds <= 0:
            return
        self._batches, self._busy_s = batches, busy_s
        sample, keep = min(max(seconds / new, _LEAST_BATCH_S), _MOST_BATCH_S), _DECAY**new
        # weights of an exponential mean that starts empty (as Adam's bias correction)
        self._weight = keep * self._weight + (1.0 - keep)
        share = (1.0 - keep) / self._weight
        self.value_s = sample if self.value_s is None else self.value_s + share * (sample - self.value_s)


@dataclass(frozen=True)
class ProjectedWorker:
    """A worker in the projection: ``done`` batches as of ``since_s`` seconds ago (negative: it starts
    that much later), ``batch_s`` per batch of ``batch_size`` samples; plans are multiples of ``multiple``
    (gradient accumulation). One that leaves before the round ends can do ``most`` batches of it.
    """

    worker: str
    done: int
    since_s: float
    batch_s: float
    batch_size: int
    multiple: int = 1
    most: int | None = None

    def batches_at(self, time_s: float) -> int:
        """Batches done in all when ``time_s`` seconds have passed from now, a multiple of ``multiple``."""
        more = math.floor((time_s + self.since_s) / self.batch_s + _SLACK)
        total = max(self.done, self.done + more)
        if self.most is not None:
            total = min(total, max(self.done, self.most))
        return total // self.multiple * self.multiple

    @property
    def limit(self) -> float:
        """Batches that it can do in all."""
        return math.inf if self.most is None else max(self.done, self.most) // self.multiple * self.multiple

    def finish_s(self, batches: int) -> float:
        """Seconds from now until that many batches are done; never in the past."""
        return max(0.0, (batches - self.done) * self.batch_s - self.since_s)


@dataclass(frozen=True)
class Projection:
    """``batches`` per worker since the round's start, ``ends_in_s`` from now."""

    batches: dict[str, int]
    ends_in_s: float


def project(paces: Sequence[ProjectedWorker], wanted: int, elapsed_s: float = 0.0) -> Projection:
    """Everybody's sync point such that at least ``wanted`` samples (all of the round) are reached.

    ``elapsed_s`` is how long the round lasts already: idle time is weighed against its whole length.
    Every worker takes part with at least one accumulation step.
    """
    if not paces:
        return Projection({}, 0.0)
    if all(pace.most is not None for pace in paces):
        # nobody stays: what is reached is what they can do
        wanted = min(wanted, int(sum(pace.limit * pace.batch_size for pace in paces)))
    earliest = _time_for(paces, wanted)
    best: tuple[float, float, dict[str, int]] | None = None
    for time_s in _candidates(paces, earliest, elapsed_s):
        counts = {pace.worker: max(pace.multiple, pace.batches_at(time_s)) for pace in paces}
        arrivals = [pace.finish_s(counts[pace.worker]) for pace in paces]
        end = max(arrivals)
        length = max(elapsed_s + end, _SLACK)
        # who can do no more does not idle for want of a later end
        idles_s = [
            end - arrival if counts[pace.worker] < pace.limit else 0.0
            for pace, arrival in zip(paces, arrivals, strict=True)
        ]
        idle = sum(idles_s) / (len(paces) * length)
        # the mean alone would let one of many wait for most of a batch of its own
        longest = max(0.0, max(idles_s) / length - _BEARABLE)
        # a round that lasts longer than asked costs little: the others train meanwhile
        cost = idle + 4.0 * longest + 0.25 * (end - earliest) / length
        if best is None or cost < best[0] - _SLACK:
            best = (cost, end, counts)
    assert best is not None
    return Projection(best[2], best[1])


def _time_for(paces: Sequence[ProjectedWorker], wanted: int) -> float:
    """The first moment from now on at which the wanted samples are reached."""

    def reached(time_s: float) -> bool:
        return sum(pace.batches_at(time_s) * pace.batch_size for pace in paces) >= wanted

    if reached(0.0):
        return 0.0
    high = min(pace.batch_s for pace in paces) + max(0.0, *(-pace.since_s for pace in paces), 0.0)
    while not reached(high):
        high *= 2.0
    low = 0.0
    for _ in range(64):
        middle = (low + high) / 2.0
        if reached(middle):
            high = middle
        else:
            low = middle
        if high - low <= 1e-6 * high:
            break
    return high


def _candidates(paces: Sequence[ProjectedWorker], earliest: float, elapsed_s: float) -> list[float]:
    """``earliest`` and every worker's next arrival after it: the best moment is one of them, or a little
    later, so that who would arrive right after it is waited for, instead of waiting for a batch of its own.
    """
    times = [earliest]
    for pace in paces:
        if pace.batches_at(earliest) >= pace.limit:
            continue
        step = pace.multiple
        after = pace.finish_s(pace.batches_at(earliest) + step)
        if after > earliest:
            insort(times, after)
    return [*times, *(time_s + 0.5 * _BEARABLE * (elapsed_s + time_s) for time_s in times)]
