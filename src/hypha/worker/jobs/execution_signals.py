"""What one run of an executor shows: its span, in which trace its rounds are, and what is counted of it."""

from __future__ import annotations

import logging

import msgspec
import trio
from opentelemetry.trace import Span, use_span

from hypha import tracing
from hypha.messages import (
    CloseRound,
    Directive,
    Event,
    Job,
    JobStamp,
    Loaded,
    ModelReady,
    Plan,
    Progress,
    RoundApplied,
    RoundStarted,
    Traced,
)
from hypha.telemetry import instruments as metrics
from hypha.tracing import round_traceparent, start_span, traceparent
from hypha.tracing.operations import EXECUTE

logger = logging.getLogger("hypha.worker")

#: Characters of an event in a log line.
_LONGEST = 500


class ExecutionSignals:
    """Of the executor that was dispatched now, for ``job`` under the lease ``lease_id``; unless it ``emits``
    spans of its own, it is not asked for any.
    """

    def __init__(self, job: Job, lease_id: str, emits: bool) -> None:
        self._job = job
        self._kind = job.executor.kind
        self._lease_id = lease_id
        self._emits = emits
        self._began = trio.current_time()
        self._span: Span | None = None
        #: what the last progress reported: (round, attempt), samples
        self._progress: tuple[tuple[int, int], int] = ((-1, 0), 0)
        self._loaded = False
        #: the round that is being closed, and since when
        self._closing: tuple[int, float] | None = None
        self.round: int | None = None
        self._fields = {"job_id": job.job_id, "worker_peer_id": job.me}

    def begin(self) -> Traced | None:
        """The executor is about to be started; what it needs to know of traces."""
        traced = self._job.traced
        self._span = start_span(
            EXECUTE,
            {
                "hypha.job": self._job.job_id,
                "hypha.job.generation": self._job.generation,
                "hypha.lease": self._lease_id,
                "hypha.executor": self._job.executor.name,
                "hypha.executor.class": self._kind,
            },
            parent=traced.traceparent if traced is not None else None,
        )
        if traced is None or not self._emits:
            return None
        with use_span(self._span):
            return msgspec.structs.replace(traced, traceparent=traceparent() or traced.traceparent)

    def end(self, code: int, stopped: bool) -> None:
        """It has ended with that exit code, or was ``stopped``."""
        failed = code != 0 and not stopped
        lasted_s = trio.current_time() - self._began
        metrics.EXECUTION_DURATION.record(
            lasted_s, kind=self._kind, status="failure" if failed else "success"
        )
        if self._span is not None:
            self._span.set_attribute("process.exit.code", code)
            if failed:
                tracing.failed(self._span, f"exit code {code}")
        self.close()

    def close(self) -> None:
        """Nothing more comes of it, whatever became of it. May be called twice."""
        span, self._span = self._span, None
        if span is not None:
            span.end()

    def trace_of(self, stamp: JobStamp) -> str | None:
        """The trace of the round of ``stamp``; that of the job before there is one."""
        traced = self._job.traced
        if traced is None:
            return None
        if self.round is None:
            return traced.traceparent
        return round_traceparent(stamp.job_id, stamp.generation, stamp.round, traced.ratio)

    def steered(self, directive: Directive) -> None:
        what = directive if isinstance(directive, Plan | CloseRound) else type(directive).__name__
        logger.debug("Passing on %s.", what, extra=self._fields)
        if isinstance(directive, CloseRound) and (
            self._closing is None or self._closing[0] != directive.round
        ):
            self._closing = (directive.round, trio.current_time())

    def theta_arrived(self, round_: int, size: int) -> None:
        self.round = round_
        logger.debug("Theta of round %d was received: %d bytes.", round_, size, extra=self._fields)

    def reported(self, event: Event) -> None:
        if isinstance(event, Progress):
            at, before = self._progress
            reported = (event.round, event.attempt)
            # a round that begins anew counts from nothing
            counted = before if at == reported and event.samples >= before else 0
            metrics.TRAINING_SAMPLES.add(max(0, event.samples - counted))
            self._progress = (reported, max(0, event.samples))
            return
        now = trio.current_time()
        logger.debug("The executor reports %s.", str(event)[:_LONGEST], extra=self._fields)
        if isinstance(event, Loaded | ModelReady) and not self._loaded:
            self._loaded = True
            metrics.EXECUTOR_LOADING.record(now - self._began, kind=self._kind)
        if isinstance(event, ModelReady | RoundStarted):
            self.round = event.round
        elif isinstance(event, RoundApplied):
            closing, self._closing = self._closing, None
            self.round = event.round + 1
            if closing is not None and closing[0] == event.round:
                metrics.OUTER_STEP_DURATION.record(now - closing[1])
