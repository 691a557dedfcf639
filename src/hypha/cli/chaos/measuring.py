"""What a disturbed job is worth: goodput, and what each fault cost, from the rounds that count.

Rounds are read from the job's ledger, which can be read whatever is done to the scheduler. The scheduler's
own account of the disturbed stretch, its goodput reports, is read from /status and added up over all
schedulers that the job had meanwhile: each counts since it began. Where one was killed and started again, one
account ends with its last reading and another begins at zero; what lies between no scheduler has seen.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import msgspec
import trio

from hypha.cli.local.children import Child, NetworkFailed
from hypha.cli.local.network import NO_ANSWER, Network
from hypha.scheduler.goodput.report import GoodputReport


@dataclass(frozen=True)
class Applied:
    """A round that was seen to be applied; it may be discarded later."""

    at: float
    round: int


@dataclass(frozen=True)
class RoundSpan:
    """From the moment ``first`` was the open round to the moment ``stop`` was it."""

    began: float
    ended: float
    first: int
    stop: int

    @property
    def wall_s(self) -> float:
        return self.ended - self.began


def goodput(stretch: RoundSpan, samples: Mapping[int, int]) -> float:
    """Samples a second, of the rounds that count: ``samples``, by round."""
    counted = sum(samples.get(number, 0) for number in range(stretch.first, stretch.stop))
    return counted / stretch.wall_s if stretch.wall_s > 0 else 0.0


def gaps(samples: Mapping[int, int], stop: int) -> list[int]:
    """Rounds before ``stop`` that should count and do not."""
    return [number for number in range(stop) if number not in samples]


def recovery_s(struck: float, applied: Sequence[Applied]) -> float | None:
    """From the fault to the next applied round; ``None`` when there was none."""
    return next((one.at - struck for one in applied if one.at > struck), None)


def costs_s(
    struck: Sequence[float], ended: float, applied: Sequence[Applied], samples: Mapping[int, int], calm: float
) -> list[float]:
    """What each fault cost, in seconds of undisturbed training at ``calm`` samples a second: what was not
    trained until the next fault struck, or until ``ended``. Below zero where more was.

    A round's samples were trained over the time since the round before it, so they are spread over it. Of
    a round that was applied again, the last time counts.
    """
    trained = _trained(applied, samples)
    costs = []
    for number, began in enumerate(struck):
        until = struck[number + 1] if number + 1 < len(struck) else ended
        done = sum(
            count * max(0.0, min(stop, until) - max(start, began)) / (stop - start)
            for start, stop, count in trained
        )
        costs.append(until - began - done / calm)
    return costs


def _trained(applied: Sequence[Applied], samples: Mapping[int, int]) -> list[tuple[float, float, int]]:
    """(from, to, samples) of each round that counts."""
    last = {one.round: number for number, one in enumerate(applied)}
    found = []
    for number, one in enumerate(applied):
        if number and last[one.round] == number and one.at > applied[number - 1].at:
            found.append((applied[number - 1].at, one.at, samples.get(one.round, 0)))
    return found


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


#: as often as a scheduler makes up its account
_READ_PAUSE_S = 0.2
#: how far the account, or its sum, may be from what was measured outside
TOLERANCE = 0.01


@dataclass(frozen=True)
class Reading:
    """What the ``scheduler`` of that name reported ``at`` that time, in ``round``."""

    at: float
    scheduler: str
    round: int
    report: GoodputReport


@dataclass(frozen=True)
class Account:
    """While there was a scheduler (``seen_s``), ``badput_s`` and ``goodput_s`` are ``places * seen_s``."""

    samples: int
    wall_s: float
    seen_s: float
    places: int
    goodput_s: float
    badput_s: dict[str, float]

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def adds_up(self) -> bool:
        """Do goodput and badput make the wall clock that was seen?"""
        total_s = self.places * self.seen_s
        return abs(self.goodput_s + sum(self.badput_s.values()) - total_s) <= TOLERANCE * total_s


def account(readings: Sequence[Reading], stretch: RoundSpan) -> Account | None:
    """From the first reading after its beginning to the first after its end. None where there is none."""
    begin = _after(readings, stretch.began, stretch.first)
    end = _after(readings, stretch.ended, stretch.stop)
    if begin is None or end is None or end.at <= begin.at:
        return None
    window = [one for one in readings if begin.at <= one.at <= end.at]
    by_scheduler = [list(group) for _, group in groupby(window, key=lambda one: one.scheduler)]
    # each counts since it began, and what the first one has from before the stretch is none of it
    newest, before = [group[-1].report for group in by_scheduler], begin.report
    seen_s = sum(one.wall_s for one in newest) - before.wall_s
    unseen_s = sum(
        following[0].at - following[0].report.wall_s - group[-1].at
        for group, following in pairwise(by_scheduler)
    )
    return Account(
        samples=end.report.samples - before.samples,
        wall_s=seen_s + max(0.0, unseen_s),
        seen_s=seen_s,
        places=end.report.places,
        goodput_s=sum(one.goodput_s for one in newest) - before.goodput_s,
        badput_s={
            reason: sum(one.badput_s[reason] for one in newest) - spent_s
            for reason, spent_s in before.badput_s.items()
        },
    )


def _after(readings: Sequence[Reading], at: float, round_: int) -> Reading | None:
    return next((one for one in readings if one.at >= at and one.round >= round_), None)


class Accountant:
    """Reads the accounts of ``network``'s schedulers."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.readings: list[Reading] = []

    async def run(self) -> None:
        while True:
            for scheduler in self._network.running("scheduler"):
                await self._read(scheduler)
            await trio.sleep(_READ_PAUSE_S)

    async def caught_up(self, stretch: RoundSpan, timeout_s: float) -> None:
        """Once the end of ``stretch`` was read, or after ``timeout_s``."""
        with trio.move_on_after(timeout_s):
            while True:
                if _after(self.readings, stretch.ended, stretch.stop) is not None:
                    return
                await trio.sleep(_READ_PAUSE_S)

    async def _read(self, scheduler: Child) -> None:
        try:
            snapshot = await self._network.status(scheduler)
        except (*NO_ANSWER, NetworkFailed, msgspec.DecodeError):
            return  # it is just being struck
        if snapshot.goodput is None:
            return
        # the newest failures are many, and nobody looks at those of a reading
        report = msgspec.structs.replace(snapshot.goodput, recoveries=())
        self.readings.append(Reading(trio.current_time(), scheduler.name, snapshot.round, report))
