"""The disturbed stretch by the scheduler's own account: its goodput reports, read from /status, added up over
all schedulers that the job had meanwhile.

A scheduler counts since it began. Where it was killed and started again, one account ends with its last
reading and another begins at zero; what lies between is time that no scheduler has seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import msgspec
import trio

from hypha.cli.chaos.goodput import RoundSpan
from hypha.cli.chaos.network import NO_ANSWER, Network, NetworkFailed, base
from hypha.cli.demo.children import Child
from hypha.scheduler.goodput.report import GoodputReport

#: as often as a scheduler makes up its account
_LOOK_S = 0.2
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
    """Of one stretch. ``seen_s`` of its ``wall_s`` there was a scheduler that kept it. ``badput_s`` and
    ``goodput_s`` are worker seconds; together they are ``places * seen_s``.
    """

    samples: int
    wall_s: float
    seen_s: float
    places: int
    goodput_s: float
    badput_s: dict[str, float]

    @property
    def samples_per_s(self) -> float:
        """Samples that count, by wall clock."""
        return self.samples / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def adds_up(self) -> bool:
        """Do goodput and badput make the wall clock that was seen?"""
        total_s = self.places * self.seen_s
        return abs(self.goodput_s + sum(self.badput_s.values()) - total_s) <= TOLERANCE * total_s


def account(readings: Sequence[Reading], stretch: RoundSpan) -> Account | None:
    """Of ``stretch``, from the first reading after its beginning to the first after its end. None without
    readings on both sides.
    """
    begin = _after(readings, stretch.began, stretch.first)
    end = _after(readings, stretch.ended, stretch.stop)
    if begin is None or end is None or end.at <= begin.at:
        return None
    window = [one for one in readings if begin.at <= one.at <= end.at]
    good_s, seen_s, unseen_s = 0.0, 0.0, 0.0
    badput: Counter[str] = Counter()
    last: Reading | None = None
    for _, group in groupby(window, key=lambda one: one.scheduler):
        readings_of_one = list(group)
        newest = readings_of_one[-1].report
        if last is None:
            oldest = readings_of_one[0].report
            good_s += newest.goodput_s - oldest.goodput_s
            seen_s += newest.wall_s - oldest.wall_s
            badput.update({key: value - oldest.badput_s[key] for key, value in newest.badput_s.items()})
        else:
            unseen_s += readings_of_one[0].at - readings_of_one[0].report.wall_s - last.at
            good_s += newest.goodput_s
            seen_s += newest.wall_s
            badput.update(newest.badput_s)
        last = readings_of_one[-1]
    return Account(
        samples=end.report.samples - begin.report.samples,
        wall_s=seen_s + max(0.0, unseen_s),
        seen_s=seen_s,
        places=end.report.places,
        goodput_s=good_s,
        badput_s=dict(badput),
    )


def _after(readings: Sequence[Reading], at: float, round_: int) -> Reading | None:
    return next((one for one in readings if one.at >= at and one.round >= round_), None)


class Accountant:
    """Reads the accounts of ``network``'s schedulers."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.readings: list[Reading] = []

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            scheduler = self._scheduler()
            if scheduler is not None:
                await self._read(scheduler)
            await trio.sleep(_LOOK_S)

    async def caught_up(self, stretch: RoundSpan, timeout_s: float) -> None:
        """Once the end of ``stretch`` was read, or after ``timeout_s``."""
        with trio.move_on_after(timeout_s):
            while True:
                if _after(self.readings, stretch.ended, stretch.stop) is not None:
                    return
                await trio.sleep(_LOOK_S)

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

    def _scheduler(self) -> Child | None:
        for child in self._network.group.running:
            if base(child.name) == "scheduler" and child.process.poll() is None:
                return child
        return None
