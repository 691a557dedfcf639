"""What a job's time went to, as plain values, and how it got over failures: how long each took to be noticed,
to be replaced and to be caught up with.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import Literal

import msgspec
from msgspec import Struct

from hypha.messages import ExecutorClass
from hypha.scheduler.goodput.place import GoodputPlace

#: failures in a report, the newest
_TOLD = 100
#: as :mod:`hypha.worker.jobs.watch` words it
_HUNG = re.compile(r"it hung: no sign of life for (\d{1,9}) s")

FailureReason = Literal["lease", "unreachable", "executor", "hang", "refused", "dropped", "other"]


class Recovery(Struct, frozen=True):
    """A failure of a worker or an executor, and how the job got over it.

    ``at_s``: when it was noticed, since the scheduler began. ``detect_s``: from the last sign of life until
    then. ``replace_s``: from then until the place trained again, or the parameter server was ready.
    ``catch_up_s``: from then until the next applied round that holds the place's update (any round, after a
    parameter server). None while that has not happened.
    """

    kind: ExecutorClass
    peer: str
    reason: FailureReason
    at_s: float
    detect_s: float
    replace_s: float | None = None
    catch_up_s: float | None = None


class GoodputReport(Struct, frozen=True):
    """Where the time of all worker places went since this scheduler began: ``goodput_s`` and the sum of
    ``badput_s`` make ``places * wall_s``. What was before a restart of the scheduler is not in it, as no
    monotonic clock lasts that long; only ``samples`` are those of the whole job.

    ``goodput_s``: worker seconds of training whose samples count. ``pending_s`` of them are of the open
    round, and may still be lost; so may rounds after the last checkpoint. ``samples_per_s``: samples of
    rounds that were applied since the scheduler began and count, by wall clock. ``calm_samples_per_s``: the
    median rate of the newest rounds to which every place contributed and in which nothing failed; None before
    there was one.
    ``runtime``: ``samples_per_s`` over that. ``scheduling``: leased over wanted worker seconds.
    """

    wall_s: float
    places: int
    goodput_s: float
    pending_s: float
    badput_s: dict[str, float]
    samples: int
    samples_per_s: float
    calm_samples_per_s: float | None
    runtime: float | None
    scheduling: float
    recoveries: tuple[Recovery, ...] = ()

    @property
    def share(self) -> float:
        """Goodput over all worker seconds, 0 to 1."""
        total_s = self.places * self.wall_s
        return self.goodput_s / total_s if total_s > 0 else 0.0


def reason_of(text: str) -> FailureReason:
    """In one word, from the text of a lease's renewal or an executor's end."""
    if "nobody is there any more" in text:
        return "unreachable"
    if _HUNG.search(text):
        return "hang"
    if text.startswith(("expired", "refused (")):
        return "lease"
    return "other"


def hung_for_s(text: str) -> float | None:
    """How long an executor had given no sign of life when its worker killed it; None of one that did not
    hang.
    """
    found = _HUNG.search(text)
    return float(found[1]) if found else None


@dataclass
class _Failure:
    """Noticed ``at``; ``place`` is None for a parameter server."""

    place: GoodputPlace | None
    at: int
    told: Recovery


class Recoveries:
    """Times are nanoseconds since the same moment as ``began``. ``changed`` grows with each failure that is
    noticed, and each step of getting over one, until whoever reads it has emptied it.
    """

    def __init__(self, began: int) -> None:
        self._began = began
        self._failures: deque[_Failure] = deque(maxlen=_TOLD)
        self.changed: list[Recovery] = []

    @property
    def told(self) -> tuple[Recovery, ...]:
        """The newest failures, the oldest first."""
        return tuple(one.told for one in self._failures)

    def failed(
        self, place: GoodputPlace | None, peer: str, reason: FailureReason, sign: int, now: int
    ) -> None:
        """What was at ``place`` gave its last sign of life at ``sign``, and that it is lost was noticed."""
        kind: ExecutorClass = "aggregate" if place is None else "train"
        recovery = Recovery(kind, peer, reason, (now - self._began) / 1e9, (now - sign) / 1e9)
        self._failures.append(_Failure(place, now, recovery))
        self.changed.append(recovery)

    def replaced(self, place: GoodputPlace | None, now: int) -> None:
        """Somebody trains at ``place`` again."""
        for one in self._failures:
            if one.place == place and one.told.replace_s is None:
                one.told = msgspec.structs.replace(one.told, replace_s=(now - one.at) / 1e9)
                self.changed.append(one.told)

    def applied(self, contributing: set[GoodputPlace | None], now: int) -> None:
        """A round was applied with the updates of these places; None stands for the parameter server."""
        for one in self._failures:
            known = one.told
            if one.place in contributing and known.replace_s is not None and known.catch_up_s is None:
                one.told = msgspec.structs.replace(known, catch_up_s=(now - one.at) / 1e9)
                self.changed.append(one.told)
