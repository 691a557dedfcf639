"""A span for a job, and one for each of its rounds, made from what its machines note in the journal.

The job's own is the root of the trace that its requests for workers and its dispatches are in. It does not
grow with the rounds: each of those is a trace, linked to the dispatches. The round machine knows nothing of
it. A round's identifiers follow from the job, its generation and the round
(:mod:`hypha.tracing`), so that workers and the parameter server put their own spans below it
without a message about it. What happens to leases meanwhile is an event of the open round's span.
"""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry.trace import Span, use_span

from hypha.journal import JournalEntry
from hypha.messages import (
    CloseRound,
    ExecutorClass,
    ExecutorError,
    ExecutorExited,
    JobStamp,
    Plan,
    RoundStarted,
    Traced,
    UpdateReceived,
)
from hypha.scheduler.leasing import events as allocation
from hypha.scheduler.leasing import renewal
from hypha.scheduler.rounds import events
from hypha.scheduler.rounds import machine as rounds
from hypha.scheduler.rounds.state import OPEN
from hypha.tracing import Attribute, failed, round_traceparent, start_span, traceparent
from hypha.tracing.operations import ROUND, RUN_JOB


class RoundTraces:
    """``ratio`` of the rounds are sampled; with ``None`` the scheduler does not trace, and no executor does.
    :meth:`note` is a listener of the job's journal.
    """

    def __init__(self, ratio: float | None) -> None:
        self._ratio = ratio
        self._job_id = ""
        self._job: Span | None = None
        #: the ``traceparent`` of the job's span; None when nothing is traced
        self.of_job: str | None = None
        #: the open round: its generation and number
        self._at: tuple[int, int] | None = None
        #: this generation of the job is at its end: the next one opens the round anew
        self._over = False
        self._span: Span | None = None
        self._dispatches: dict[tuple[str, ExecutorClass], str] = {}

    def begin(self, job: str) -> None:
        if self._ratio is None:
            return
        self._job = start_span(RUN_JOB, {"hypha.job.name": job})
        with use_span(self._job):
            self.of_job = traceparent()

    def of_round(self, stamp: JobStamp, round_: int) -> str | None:
        """The ``traceparent`` of ``round_`` in that generation of the job; None when nothing is traced."""
        if self._ratio is None:
            return None
        return round_traceparent(stamp.job_id, stamp.generation, round_, self._ratio)

    def dispatching(self, worker: str, kind: ExecutorClass) -> Traced | None:
        """What goes into the job that is dispatched in the current span. Rounds link to it."""
        parent = traceparent()
        if self._ratio is None or parent is None:
            return None
        self._dispatches[worker, kind] = parent
        return Traced(traceparent=parent, ratio=self._ratio)

    def note(self, entry: JournalEntry) -> None:
        if self._ratio is None:
            return
        if entry.machine == rounds.NAME:
            self._round_machine(entry)
            return
        # the name of a renewal ends with its lease's id
        lease = entry.machine.partition(":")[2]
        for what in (entry.event, *entry.actions):
            match what:
                case allocation.Gained(lease_id):
                    self._happened("lease gained", lease=lease_id)
                case allocation.LeaseFailed(lease_id):
                    self._happened("lease lost", lease=lease_id)
                case renewal.Suspected(reason):
                    self._happened("lease suspect", lease=lease, reason=reason)
                case renewal.Recovered():
                    self._happened("lease recovered", lease=lease)

    def close(self) -> None:
        self._end("the job ended")
        job, self._job = self._job, None
        if job is not None:
            job.end()

    def _round_machine(self, entry: JournalEntry) -> None:
        for what in (entry.event, *entry.actions):
            self._take(what)
        state = entry.state
        if isinstance(state, Mapping) and state["phase"] in OPEN and not self._over:
            self._open(int(str(state["generation"])), int(str(state["round"])))

    def _take(self, what: object) -> None:
        """An event of the round machine, or an action."""
        match what:
            case events.GenerationBegan(start=start):
                self._job_id = start.job_id
                if self._job is not None:
                    self._job.set_attribute("hypha.job", self._job_id)
                self._end("the generation of the job ended")
                self._over = False
            case events.Told(sender=sender, event=RoundStarted(round=round_)) if self._is_open(round_):
                self._happened("worker started", peer=sender)
            case events.Told(event=UpdateReceived() as update) if self._is_open(update.round):
                self._happened("update received", peer=update.worker, samples=update.samples)
            case events.ParticipantLost(peer=peer, kind=kind, reason=reason):
                # rounds are not linked any more to what was dispatched there
                self._dispatches.pop((peer, kind), None)
                self._happened(f"{kind} executor lost", peer=peer, reason=reason)
            case events.Told(sender=sender, kind=kind, event=ExecutorError() | ExecutorExited()):
                self._happened(f"{kind} executor ended", peer=sender)
            case events.Send(to=to, directive=Plan(batches=int(batches))):
                self._happened("round planned", peer=to.peer, batches=batches)
            case events.Send(directive=CloseRound()):
                self._happened("round closed")
            case events.Drop(peer=peer, reason=reason):
                self._happened("worker replaced", peer=peer, reason=reason)
            case events.LetGo(peer=peer, reason=reason):
                self._happened("worker left", peer=peer, reason=reason)
            case events.Again(peer=peer, reason=reason):
                self._happened("executor started again", peer=peer, reason=reason)
            case events.Record(entry=applied) if self._is_open(applied.round):
                workers = len(applied.contributors)
                self._happened("round applied", samples=applied.samples, workers=workers)
                self._end("")
            case events.Restart(reason=reason):
                self._happened("restart", reason=reason)
                self._end(reason)
                self._over = True
            case events.Fail(error=error):
                self._end(str(error))

    def _is_open(self, round_: int) -> bool:
        return self._at is not None and self._at[1] == round_

    def _open(self, generation: int, round_: int) -> None:
        if self._ratio is None or self._at == (generation, round_):
            return
        self._end("another round began")
        self._at = (generation, round_)
        self._span = start_span(
            ROUND,
            {"hypha.job": self._job_id, "hypha.job.generation": generation, "hypha.round": round_},
            identity=round_traceparent(self._job_id, generation, round_, self._ratio),
            links=tuple(self._dispatches.values()),
        )

    def _happened(self, name: str, **attributes: Attribute) -> None:
        if self._span is not None:
            self._span.add_event(name, {f"hypha.{key}": value for key, value in attributes.items()})

    def _end(self, why: str) -> None:
        """End the open round's span; ``why`` it was never applied, empty when it was."""
        span, self._span, self._at = self._span, None, None
        if span is not None:
            if why:
                failed(span, why)
            span.end()
