"""An executor's spans: recorded by OpenTelemetry's API alone, and handed to the worker over the bridge.

The SDK would cost an executor memory, threads and an exporter of its own that it may not be allowed to have;
its worker has one. Nothing here waits for the network in the way of training: spans are posted in batches by
the thread that reports events, and dropped when there are too many or nobody takes them. Only what is below a
sampled span of somebody else is recorded: the scheduler decides which rounds are.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, cast

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from hypha.errors import HyphaError, Refused
from hypha.messages import MAX_SPANS_A_CALL, FinishedSpan, Job, SpanAttribute, SpanEvent
from hypha.tracing import Attribute, round_traceparent, span
from hypha.tracing.operations import Operation

#: Spans that wait to be posted; beyond that new ones are dropped.
MAX_WAITING = 2048
#: A span has at most so many events and attributes, of at most so many characters; the worker refuses more.
MAX_EVENTS, MAX_ATTRIBUTES, MAX_TEXT = 128, 32, 1024
#: So long a span waits for others to be posted with.
_GATHER_S = 1.0
_ENOUGH = 64

Post = Callable[[Sequence[FinishedSpan]], None]
_Kind = Literal["internal", "client", "server", "producer", "consumer"]


class Traces:
    """In which traces the operations of ``job`` are; in none where the job is not traced."""

    def __init__(self, job: Job) -> None:
        self._job_id = job.job_id
        self._traced = job.traced

    def in_dispatch(self, operation: Operation) -> AbstractContextManager[Span]:
        """``operation`` as a part of the job's dispatch."""
        parent = None if self._traced is None else self._traced.traceparent
        return span(operation, {"hypha.job": self._job_id}, parent=parent)

    def in_round(self, operation: Operation, generation: int, round_: int) -> AbstractContextManager[Span]:
        """``operation`` as a part of that round, from any thread."""
        parent = None
        if self._traced is not None:
            parent = round_traceparent(self._job_id, generation, round_, self._traced.ratio)
        attributes: dict[str, Attribute] = {
            "hypha.job": self._job_id,
            "hypha.job.generation": generation,
            "hypha.round": round_,
        }
        return span(operation, attributes, parent=parent)


class SpanRecorder(trace.TracerProvider):
    """Gathers spans that have ended, until ``post`` is called with them, by :meth:`post_waiting`. ``post``
    raises :class:`HyphaError` when they are not taken; they are dropped then.
    """

    def __init__(self, post: Post) -> None:
        self._post = post
        self._waiting: deque[FinishedSpan] = deque()
        self._lock = threading.Lock()
        self._posting = threading.Lock()
        self._posted_at = time.monotonic()
        #: nobody wants any more
        self._closed = False
        self.dropped = 0

    def get_tracer(self, *args: Any, **kwargs: Any) -> trace.Tracer:
        """As OpenTelemetry's API has it."""
        return _Tracer(self)

    def ended(self, finished: FinishedSpan) -> None:
        """Take charge of ``finished``, from any thread; never blocks."""
        with self._lock:
            if self._closed or len(self._waiting) >= MAX_WAITING:
                self.dropped += 1
            else:
                self._waiting.append(finished)

    def post_waiting(self, least_s: float = _GATHER_S) -> None:
        """Post those that wait, if they are many, or the last ones were posted ``least_s`` ago. Blocks."""
        if time.monotonic() - self._posted_at < least_s and len(self._waiting) < _ENOUGH:
            return
        self._posted_at = time.monotonic()
        # one at a time, so that what another thread has begun to post is posted when this returns
        with self._posting:
            self._post_all()

    def _post_all(self) -> None:
        while self._waiting:
            with self._lock:
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_SPANS_A_CALL))]
            try:
                self._post(batch)
            except (HyphaError, ValueError) as exc:
                # a worker that is gone is noticed by those who need it; what cannot be encoded is no span
                self.dropped += len(batch)
                if isinstance(exc, Refused) and exc.code == "unsupported":
                    self._closed = True
                    self._waiting.clear()

    def flush(self, timeout_s: float) -> bool:
        """Have all that waits posted; False when it took longer."""
        posting = threading.Thread(target=self.post_waiting, args=(0.0,), daemon=True)
        posting.start()
        posting.join(timeout_s)
        return not posting.is_alive()


class _Tracer(trace.Tracer):
    def __init__(self, recorder: SpanRecorder) -> None:
        self._recorder = recorder

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Any = None,
        links: Any = None,
        start_time: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Span:
        parent = trace.get_current_span(context).get_span_context()
        if not parent.is_valid or not parent.trace_flags.sampled:
            # what is below it is not sampled either
            return trace.NonRecordingSpan(parent)
        started = _Span(self._recorder, name, parent, kind, start_time or time.time_ns(), links or ())
        started.set_attributes(attributes or {})
        return started

    def start_as_current_span(self, *args: Any, **kwargs: Any) -> Any:
        """Not used here: :func:`hypha.tracing.span` is."""
        raise NotImplementedError("use hypha.tracing.span")


class _Span(trace.NonRecordingSpan):
    """One that is recorded, as far as executors have to say something; for any thread, one at a time."""

    def __init__(
        self,
        recorder: SpanRecorder,
        name: str,
        parent: SpanContext,
        kind: SpanKind,
        start_ns: int,
        links: Sequence[Link],
    ) -> None:
        # chance of the process's own: the trainer's is seeded
        number = int.from_bytes(secrets.token_bytes(8)) or 1
        super().__init__(
            SpanContext(parent.trace_id, number, False, TraceFlags(TraceFlags.SAMPLED), parent.trace_state)
        )
        self._recorder = recorder
        self._start_ns = start_ns
        self._finished = partial(
            FinishedSpan,
            name=name,
            trace_id=trace.format_trace_id(parent.trace_id),
            span_id=trace.format_span_id(number),
            parent_id=trace.format_span_id(parent.span_id),
            start_ns=start_ns,
            kind=cast("_Kind", kind.name.lower()),
            links=tuple(_written(link.context) for link in links),
        )
        self._attributes: dict[str, SpanAttribute] = {}
        self._events: list[SpanEvent] = []
        self._status: Literal["unset", "ok", "error"] = "unset"
        self._error = ""
        self._ended = False

    def is_recording(self) -> bool:
        return not self._ended

    def set_attribute(self, key: str, value: Any) -> None:
        if key in self._attributes or len(self._attributes) < MAX_ATTRIBUTES:
            self._attributes[key] = _plain(value)

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        for key, value in attributes.items():
            self.set_attribute(key, value)

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        if len(self._events) < MAX_EVENTS:
            plain = {key: _plain(value) for key, value in (attributes or {}).items()}
            at = timestamp or time.time_ns()
            self._events.append(SpanEvent(name=name, time_ns=at, attributes=plain))

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        code = status if isinstance(status, StatusCode) else status.status_code
        text = description if isinstance(status, StatusCode) else status.description
        if code is StatusCode.ERROR:
            self._status, self._error = "error", _clean(text or "")
        elif code is StatusCode.OK:
            self._status, self._error = "ok", ""

    def end(self, end_time: int | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        # the machine's time may have been set back meanwhile
        end_ns = max(self._start_ns, end_time or time.time_ns())
        self._recorder.ended(
            self._finished(
                end_ns=end_ns,
                status=self._status,
                error=self._error,
                attributes=self._attributes,
                events=tuple(self._events),
            )
        )


def _written(context: SpanContext) -> str:
    flags = "01" if context.trace_flags.sampled else "00"
    return f"00-{trace.format_trace_id(context.trace_id)}-{trace.format_span_id(context.span_id)}-{flags}"


def _plain(value: Any) -> SpanAttribute:
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return _clean(str(value))


def _clean(text: str) -> str:
    """Cut, and without what UTF-8 has no place for, such as the bytes of a file name that is none."""
    return text[:MAX_TEXT].encode("utf-8", "replace").decode()
