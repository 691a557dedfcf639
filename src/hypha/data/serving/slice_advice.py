"""How large slices should be: from how fast workers train, how fast data reaches them, and how much there is.

Pure arithmetic; ``hypha-data advise`` prints it. Three things pull at the size of a slice:

* A worker fetches the next slice while it trains on the present one. Each fetch has a fixed cost besides its
  bytes (asking the scheduler, the data node, verifying), so slices must last long enough to hide it.
* Nobody trains before the first slice is there, and all workers want theirs at once: so slices are not to
  take long.
* A slice goes to one worker at a time, and all that a worker holds must fit into its cache: so there are to
  be several a worker, of which a few fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypha.messages import Manifest

#: Journeys there and back that a fetch takes besides its bytes: to the scheduler, the pull and its offer, the
#: receiver's answer and its acknowledgement; over a connection that was kept.
JOURNEYS = 4
#: Time of a fetch that is neither journeys nor the line: verifying, the disk, a busy machine.
HANDLING_S = 0.05
#: A slice every so many seconds costs the scheduler and the data node next to nothing.
COMFORTABLE_S = 30.0
#: Slices a worker and epoch, at least: with fewer some wait at the end of each epoch while others train.
LEAST_PER_WORKER = 4
#: A load above this leaves no room for a line that is slower now and then.
BUSY = 0.8
LEAST_MB = 0.001
MOST_MB = 2048.0


@dataclass(frozen=True)
class TrainingPace:
    """How workers train and what leads to them. Rates in megabits (10^6 bits) a second."""

    workers: int
    #: what one sample takes on disk
    sample_bytes: float
    #: samples of a batch, and how long a worker takes for one
    batch_size: int
    batch_s: float
    #: what one data node can send
    mbit: float
    data_nodes: int = 1
    #: what one worker can receive; None: as much as a data node can send
    worker_mbit: float | None = None
    round_trip_s: float = 0.05
    #: how long the start may wait for the first slices
    start_s: float = 10.0
    #: as the workers' ``cache.max_gb`` and ``cache.max_slices`` say
    cache_gb: float = 20.0
    cache_slices: int = 10
    #: of the whole dataset, where that is known
    dataset_bytes: float | None = None

    @property
    def need(self) -> float:
        """Bytes a second that one worker trains on."""
        return self.batch_size * self.sample_bytes / self.batch_s

    @property
    def share(self) -> float:
        """Bytes a second that reach one worker when all fetch."""
        sent = self.data_nodes * self.mbit * 1e6 / 8 / self.workers
        return sent if self.worker_mbit is None else min(sent, self.worker_mbit * 1e6 / 8)

    @property
    def fixed_s(self) -> float:
        """What a fetch takes besides its bytes."""
        return JOURNEYS * self.round_trip_s + HANDLING_S


@dataclass(frozen=True)
class SliceAdvice:
    """``slice_mb`` is what to prepare with; MB are 10^6 bytes. ``because`` explains it, a sentence each."""

    slice_mb: float
    slice_samples: int
    #: no smaller and no larger than that; where nothing fits, the smallest is above the largest
    smallest_mb: float
    largest_mb: float
    #: of the line to the workers, 1 when it just suffices
    load: float
    #: seconds that a slice is trained on, and that fetching it takes when all fetch
    lasts_s: float
    fetched_in_s: float
    because: tuple[str, ...]
    #: what stays wrong with any size
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Fit:
    """How a prepared dataset fits; ``problems`` say what to do."""

    slices: int
    mean_mb: float
    largest_mb: float
    problems: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems


def advise(pace: TrainingPace) -> SliceAdvice:
    """What suits ``pace``, all numbers of which are above 0."""
    load = pace.need / pace.share
    smallest, why_smallest = _smallest(pace, load)
    largest, why_largest = min(_largest(pace))
    size = min(max(pace.need * COMFORTABLE_S, smallest), largest)
    size = _handy(min(max(size / 1e6, LEAST_MB), MOST_MB), smallest / 1e6, largest / 1e6)
    because = [
        f"a worker trains on {_rate(pace.need)}, and {_rate(pace.share)} reach it when all "
        f"{pace.workers} fetch: the line is used to {load:.0%}",
        why_smallest,
        why_largest,
    ]
    cached = min(pace.cache_gb * 1e9, pace.cache_slices * size * 1e6)
    if pace.dataset_bytes is not None and pace.dataset_bytes <= pace.workers * cached:
        because.append("the caches of the workers hold the whole dataset: only the first epoch is fetched")
    return SliceAdvice(
        slice_mb=size,
        slice_samples=max(1, round(size * 1e6 / pace.sample_bytes)),
        smallest_mb=_rounded(smallest / 1e6),
        largest_mb=_rounded(largest / 1e6),
        load=load,
        lasts_s=size * 1e6 / pace.need,
        fetched_in_s=pace.fixed_s + size * 1e6 / pace.share,
        because=tuple(because),
        problems=tuple(_problems(pace, load, smallest, largest)),
    )


def fit(manifest: Manifest, pace: TrainingPace, advice: SliceAdvice) -> Fit:
    """Whether the slices of ``manifest`` are within what was advised."""
    sizes = [part.size for part in manifest.slices]
    mean, largest = sum(sizes) / len(sizes), max(sizes)
    again = f"prepare it again with --slice-mb {advice.slice_mb:g}"
    problems = []
    if len(sizes) < pace.workers:
        problems.append(
            f"it has {len(sizes)} slices for {pace.workers} workers, and a slice goes to one worker at a "
            f"time: some would wait; {again}"
        )
    elif len(sizes) < LEAST_PER_WORKER * pace.workers:
        problems.append(
            f"it has {len(sizes)} slices, fewer than {LEAST_PER_WORKER} a worker: some wait at the end of "
            f"each epoch; {again}"
        )
    # what only the number of slices shows has been reported
    bound, why = min((bound, why) for bound, why in _largest(pace) if "epoch" not in why)
    if largest > 1.1 * bound:
        problems.append(f"its largest slice has {largest / 1e6:.1f} MB, and {why}; {again}")
    if mean < 0.9 * advice.smallest_mb * 1e6 and advice.smallest_mb <= advice.largest_mb:
        problems.append(
            f"its slices have {mean / 1e6:.2g} MB, and below {advice.smallest_mb:g} MB a worker waits for "
            f"the next one; {again}"
        )
    return Fit(len(sizes), mean / 1e6, largest / 1e6, tuple(problems))


def _smallest(pace: TrainingPace, load: float) -> tuple[float, str]:
    """Bytes below which the fixed cost of a fetch cannot be hidden behind the training, and why."""
    fixed = f"a fetch takes {pace.fixed_s:.2g} s besides its bytes"
    if load < BUSY:
        least = pace.fixed_s / (1.0 / pace.need - 1.0 / pace.share)
        return least, f"{fixed}, which slices of {_size(least)} or more hide behind the training"
    # with a line that is full anyhow, so much that the fixed cost is a tenth of the way
    least = 9.0 * pace.fixed_s * pace.share
    return least, f"{fixed}, which is a tenth or less of the whole from {_size(least)} on"


def _largest(pace: TrainingPace) -> list[tuple[float, str]]:
    """Bytes above which something else suffers, each with what."""
    start = max(pace.start_s - pace.fixed_s, 0.1) * pace.share
    cache = pace.cache_gb * 1e9 / pace.cache_slices
    found = [
        (
            start,
            f"above {_size(start)} the start waits for the first slices for more than {pace.start_s:g} s",
        ),
        (cache, f"above {_size(cache)} a worker's cache does not hold {pace.cache_slices} slices"),
    ]
    if pace.dataset_bytes is not None:
        part = pace.dataset_bytes / (LEAST_PER_WORKER * pace.workers)
        found.append(
            (part, f"above {_size(part)} there are fewer than {LEAST_PER_WORKER} a worker and epoch")
        )
    return found


def _problems(pace: TrainingPace, load: float, smallest: float, largest: float) -> list[str]:
    found = []
    if load >= 1.0:
        needed = pace.need * pace.workers * 8 / 1e6
        more = math.ceil(pace.data_nodes * load / BUSY)
        wait = f"the line cannot keep up, whatever the slices: workers wait {1 - 1 / load:.0%} of the time"
        if pace.worker_mbit is not None and pace.worker_mbit * 1e6 / 8 < pace.need:
            found.append(f"{wait}; each needs {pace.need * 8 / 1e6:.1f} Mbit/s and can receive less")
        else:
            found.append(
                f"{wait}; {needed:.0f} Mbit/s are needed: {more} data nodes like this one, fewer workers, or "
                "columns of fewer bytes (--dtype)"
            )
    elif load >= BUSY:
        found.append(
            f"the line is used to {load:.0%}: whenever it is slower than that, workers wait; a second data "
            "node with the same dataset helps"
        )
    if smallest > largest:
        found.append(
            f"no size is right: slices should have {_size(smallest)} at least and {_size(largest)} at most; "
            "what was taken is the largest"
        )
    return found


def _handy(size_mb: float, smallest_mb: float, largest_mb: float) -> float:
    """A power of two near ``size_mb`` that is within the bounds, where there is one."""
    power = 2.0 ** round(math.log2(size_mb))
    for candidate in (power, power / 2, power * 2):
        if smallest_mb <= candidate <= largest_mb:
            return candidate
    return _rounded(size_mb)


def _rounded(size_mb: float) -> float:
    """Two digits are enough."""
    return float(f"{size_mb:.2g}")


def _size(size: float) -> str:
    return f"{_rounded(size / 1e6):g} MB"


def _rate(bytes_s: float) -> str:
    return f"{_rounded(bytes_s / 1e6):g} MB/s"
