"""Spans of executors, which their worker exports for them: they have no collector, and no secret of one.

The service is ``hypha-executor``; all else of the resource is the worker's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from hypha.messages import FinishedSpan
from hypha.tracing.spans import context_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

SERVICE = "hypha-executor"


class ExecutorSpanExport:
    """Gives what executors hand over to ``processor``."""

    def __init__(self, processor: BatchSpanProcessor, resource: Resource) -> None:
        self._processor = processor
        self._resource = resource.merge(Resource({"service.name": SERVICE}))
        self._scope = InstrumentationScope("hypha")

    def emit(self, spans: Sequence[FinishedSpan]) -> None:
        """Export ``spans``; never blocks. One whose identifiers are none is left out."""
        for one in spans:
            if (found := self._readable(one)) is not None:
                self._processor.on_end(found)

    def _readable(self, one: FinishedSpan) -> ReadableSpan | None:
        context = _context(one.trace_id, one.span_id)
        if context is None:
            return None
        links = [trace.get_current_span(context_of(text)).get_span_context() for text in one.links]
        return ReadableSpan(
            name=one.name,
            context=context,
            parent=_context(one.trace_id, one.parent_id) if one.parent_id else None,
            resource=self._resource,
            attributes=one.attributes,
            events=[Event(event.name, event.attributes, event.time_ns) for event in one.events],
            links=[Link(link) for link in links if link.is_valid],
            kind=SpanKind[one.kind.upper()],
            status=Status(StatusCode[one.status.upper()], one.error or None),
            start_time=one.start_ns,
            end_time=one.end_ns,
            instrumentation_scope=self._scope,
        )


def _context(trace_id: str, span_id: str) -> SpanContext | None:
    try:
        found = SpanContext(int(trace_id, 16), int(span_id, 16), True, TraceFlags(TraceFlags.SAMPLED))
    except ValueError:
        return None
    return found if found.is_valid else None
