"""Goodput as it leaves the scheduler: a listener of the job's journal, and its metrics.

The counters of worker seconds grow by what cannot change any more (:meth:`Goodput.certain`), so they lag
behind the report by up to a checkpoint. If a checkpoint turns out to be damaged and the job goes back to an
older one, what was counted stays counted, and the counter of goodput stands still until as much was trained
again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable

from hypha.journal import Journal, JournalEntry
from hypha.messages import LedgerRound, ModelReady, SendModel
from hypha.scheduler.goodput.machine import Goodput
from hypha.scheduler.goodput.report import FailureNoticed, GoodputReport, RecoveryStep
from hypha.scheduler.rounds import events
from hypha.scheduler.rounds.machine import NAME as ROUNDS
from hypha.scheduler.rounds.state import RoundState
from hypha.telemetry import instruments as metrics

logger = logging.getLogger("hypha.scheduler")

#: between two looks at what is certain
_COUNT_S = 1.0


class GoodputSignals:
    """Of one run of a job that wants ``places`` workers and began at ``began``, of trio's clock; ``machine``
    gives its present round machine, None before there is one. What fails in here is logged once and ends
    nothing but the figures; where the machines of ``journal`` are checked, it raises AssertionError.
    """

    def __init__(
        self, journal: Journal, places: int, began: float, machine: Callable[[], RoundState | None]
    ) -> None:
        self._journal = journal
        self._goodput = Goodput(places, began, machine)
        self._counted_at = -math.inf
        self._good_s = 0.0
        self._bad_s: dict[str, float] = {}
        self._theta_bytes = self._sent_thetas = 0
        self._shown: set[str] = set()
        journal.listeners.append(self.listen)

    def resume(self, rounds: Iterable[LedgerRound]) -> None:
        """What an earlier scheduler of the job has left in the ledger."""
        self._goodput.resume({entry.round: entry.samples for entry in rounds})

    def listen(self, entry: JournalEntry) -> None:
        for one in self._goodput.handle(entry):
            match one:
                case FailureNoticed(kind=kind, reason=reason):
                    metrics.FAILURES.add(kind=kind, reason=reason)
                case RecoveryStep(phase=phase, seconds=seconds):
                    metrics.RECOVERY_DURATION.record(seconds, phase=phase)
        if self._journal.checked:
            self._goodput.validate()
        if entry.machine == ROUNDS:
            self._show(entry)

    def report(self, now: float) -> GoodputReport | None:
        """As far as is known at ``now``; None when that has failed. The metrics follow it."""
        if self.listen not in self._journal.listeners:
            return None
        try:
            report = self._goodput.report(now)
            metrics.GOODPUT.set(report.samples_per_s)
            if now >= self._counted_at + _COUNT_S or self._goodput.ended:
                self._count(now)
        except Exception as exc:  # noqa: BLE001 - the edge of a service: figures of a job must not end it
            logger.error("Goodput is not known any more: %r", exc)
            self._journal.leave(self.listen)
            return None
        return report

    def _count(self, now: float) -> None:
        self._counted_at = now
        good_s, bad_s = self._goodput.certain(now)
        metrics.GOODPUT_SECONDS.add(max(0.0, good_s - self._good_s))
        self._good_s = max(good_s, self._good_s)
        for reason, seconds in bad_s.items():
            metrics.BADPUT_SECONDS.add(max(0.0, seconds - self._bad_s.get(reason, 0.0)), reason=reason)
        self._bad_s = bad_s

    def close(self) -> None:
        """Hear of nothing any more, and show nothing."""
        self._journal.leave(self.listen)
        self._forget(self._shown)
        metrics.GOODPUT.forget()
        metrics.LOSS.forget()
        for kind in ("update", "theta"):
            metrics.ROUND_BYTES.forget(kind=kind)

    def _show(self, entry: JournalEntry) -> None:
        if isinstance(entry.event, events.Told) and isinstance(entry.event.event, ModelReady):
            self._theta_bytes = entry.event.event.size_bytes
        for action in entry.actions:
            match action:
                case events.Send(directive=SendModel()):
                    self._sent_thetas += 1
                case events.Record(entry=record):
                    self._applied(record, entry)

    def _applied(self, record: LedgerRound, entry: JournalEntry) -> None:
        metrics.LOSS.set(record.loss)
        present = {part.worker for part in record.contributors}
        self._forget(self._shown - present)
        self._shown = present
        for part in record.contributors:
            metrics.WORKER_LOSS.set(part.loss, worker=part.worker)
        for one in record.updates:
            if one.worker in present:
                metrics.UPDATE_NORM.set(one.norm, worker=one.worker)
                if one.cosine is not None:
                    metrics.UPDATE_COSINE.set(one.cosine, worker=one.worker)
                else:
                    metrics.UPDATE_COSINE.forget(worker=one.worker)
        metrics.ROUND_BYTES.set(sum(one.size_bytes for one in record.updates), kind="update")
        # theta of the round went to those who got it on request, and that of the next goes to all members
        members = int(str(entry.state["members"])) if not isinstance(entry.state, str) else 0
        metrics.ROUND_BYTES.set((members + self._sent_thetas) * self._theta_bytes, kind="theta")
        self._sent_thetas = 0

    def _forget(self, workers: set[str]) -> None:
        for peer in workers:
            for gauge in (metrics.WORKER_LOSS, metrics.UPDATE_NORM, metrics.UPDATE_COSINE):
                gauge.forget(worker=peer)
