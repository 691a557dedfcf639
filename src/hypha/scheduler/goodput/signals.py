"""Goodput as it leaves the scheduler: a listener of the job's journal, and its counters.

The counters of worker seconds grow by what cannot change any more (:meth:`Goodput.certain`), so they lag
behind the report by up to a checkpoint. If a checkpoint turns out to be damaged and the job goes back to an
older one, what was counted stays counted, and the counter of goodput stands still until as much was trained
again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from hypha.journal import Journal, JournalEntry
from hypha.scheduler.goodput.machine import Goodput
from hypha.scheduler.goodput.report import GoodputReport
from hypha.scheduler.rounds.state import RoundState
from hypha.scheduler.status.snapshot import Progressed
from hypha.telemetry import instruments as metrics

logger = logging.getLogger("hypha.scheduler")

#: between two looks at what is certain
_COUNT_S = 1.0


class GoodputSignals:
    """Of one run of a job that wants ``places`` workers and began at ``began``, of trio's clock; ``machine``
    gives its present round machine, None before there is one, and ``progressed`` has the rounds that count.
    What fails in here is logged once and ends nothing but the figures; where the machines of ``journal`` are
    checked, it raises AssertionError.
    """

    def __init__(
        self,
        journal: Journal,
        places: int,
        began: float,
        machine: Callable[[], RoundState | None],
        progressed: Progressed,
    ) -> None:
        self._journal = journal
        self._goodput = Goodput(places, began, machine, progressed)
        self._counted_at = -math.inf
        self._good_s = 0.0
        self._bad_s: dict[str, float] = {}
        journal.listeners.append(self.listen)

    def listen(self, entry: JournalEntry) -> None:
        try:
            changed = self._goodput.handle(entry)
            if self._journal.checked:
                self._goodput.validate()
        except Exception as exc:
            if self._journal.checked:
                raise
            self._give_up(exc)
            return
        for one in changed:
            if one.catch_up_s is not None:
                metrics.RECOVERY_DURATION.record(one.catch_up_s, phase="catch-up")
            elif one.replace_s is not None:
                metrics.RECOVERY_DURATION.record(one.replace_s, phase="replace")
            else:
                metrics.FAILURES.add(kind=one.kind, reason=one.reason)
                metrics.RECOVERY_DURATION.record(one.detect_s, phase="detect")

    def report(self, now: float) -> GoodputReport | None:
        """As far as is known at ``now``; None when that has failed. The counters follow it."""
        if self.listen not in self._journal.listeners:
            return None
        try:
            report = self._goodput.report(now)
            if now >= self._counted_at + _COUNT_S or self._goodput.ended:
                self._count(now)
        except Exception as exc:  # noqa: BLE001 - the edge of a service: figures of a job must not end it
            self._give_up(exc)
            return None
        return report

    def _give_up(self, exc: Exception) -> None:
        logger.error("Goodput is not known any more: %r", exc)
        self._journal.leave(self.listen)

    def _count(self, now: float) -> None:
        self._counted_at = now
        good_s, bad_s = self._goodput.certain(now)
        metrics.GOODPUT_SECONDS.add(max(0.0, good_s - self._good_s))
        self._good_s = max(good_s, self._good_s)
        for reason, seconds in bad_s.items():
            metrics.BADPUT_SECONDS.add(max(0.0, seconds - self._bad_s.get(reason, 0.0)), reason=reason)
        self._bad_s = bad_s

    def close(self) -> None:
        """Hear of nothing any more."""
        self._journal.leave(self.listen)
