"""Getting over failures: how long each took to be noticed, to be replaced and to be caught up with."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

from hypha.messages import ExecutorClass
from hypha.scheduler.goodput.report import (
    FailureNoticed,
    FailureReason,
    GoodputNews,
    Recovery,
    RecoveryStep,
)

#: failures in a report, the newest
_TOLD = 100
#: as :mod:`hypha.worker.jobs.watch` words it
_HUNG = re.compile(r"it hung: no sign of life for (\d{1,9}) s")


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
class _Open:
    """A failure that the job is not over yet. ``place`` is None for a parameter server."""

    place: int | None
    kind: ExecutorClass
    peer: str
    reason: FailureReason
    at: int
    sign: int
    replaced: int | None = None
    caught_up: int | None = None

    def value(self, began: int) -> Recovery:
        return Recovery(
            kind=self.kind,
            peer=self.peer,
            reason=self.reason,
            at_s=(self.at - began) / 1e9,
            detect_s=(self.at - self.sign) / 1e9,
            replace_s=None if self.replaced is None else (self.replaced - self.at) / 1e9,
            catch_up_s=None if self.caught_up is None else (self.caught_up - self.at) / 1e9,
        )


class Recoveries:
    """Times are nanoseconds since the same moment as ``began``."""

    def __init__(self, began: int) -> None:
        self._began = began
        self._all: deque[_Open] = deque(maxlen=_TOLD)

    @property
    def told(self) -> tuple[Recovery, ...]:
        """The newest failures, the oldest first."""
        return tuple(one.value(self._began) for one in self._all)

    def failed(
        self, place: int | None, kind: ExecutorClass, peer: str, reason: FailureReason, sign: int, now: int
    ) -> list[GoodputNews]:
        """What was at ``place`` gave its last sign of life at ``sign``, and that it is lost was noticed."""
        self._all.append(_Open(place, kind, peer, reason, now, sign))
        return [FailureNoticed(kind, reason), RecoveryStep("detect", (now - sign) / 1e9)]

    def replaced(self, place: int | None, now: int) -> list[GoodputNews]:
        """Somebody trains at ``place`` again."""
        found: list[GoodputNews] = []
        for one in self._all:
            if one.place == place and one.replaced is None:
                one.replaced = now
                found.append(RecoveryStep("replace", (now - one.at) / 1e9))
        return found

    def applied(self, contributing: set[int | None], now: int) -> list[GoodputNews]:
        """A round was applied with the updates of these places; None stands for the parameter server."""
        found: list[GoodputNews] = []
        for one in self._all:
            if one.place in contributing and one.replaced is not None and one.caught_up is None:
                one.caught_up = now
                found.append(RecoveryStep("catch-up", (now - one.at) / 1e9))
        return found
