"""What a test's nodes say of themselves, kept in memory by OpenTelemetry's own SDK: spans and metrics.

Use it through the fixture ``signals`` (``from tests.support.signals import signals`` in a conftest)::

    async def test_something(network, signals):
        with span(ADVERTISE) as outer:
            ...
        (request,) = signals.spans("Request")
        assert signals.parent_of(request) is ...
        assert signals.reading(instruments.REPORTS, event="sent") == 2
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hypha.telemetry import metrics
from hypha.telemetry.metrics import Instrument
from hypha.telemetry.sdk import Identifiers


@dataclass
class Signals:
    """Spans that have ended, and what instruments read."""

    exporter: InMemorySpanExporter
    reader: InMemoryMetricReader

    def spans(self, name: str = "", **attributes: object) -> list[ReadableSpan]:
        """Ended spans in the order in which they began; ``rpc_method="Health"`` is ``rpc.method``."""
        wanted = {key.replace("_", "."): value for key, value in attributes.items()}
        found = [
            one
            for one in self.exporter.get_finished_spans()
            if name in ("", one.name)
            and all((one.attributes or {}).get(key) == value for key, value in wanted.items())
        ]
        return sorted(found, key=lambda one: one.start_time or 0)

    def parent_of(self, span: ReadableSpan) -> ReadableSpan | None:
        """The span of which ``span`` is a child, if it has ended."""
        if span.parent is None:
            return None
        wanted = (span.parent.trace_id, span.parent.span_id)
        ended = {(one.context.trace_id, one.context.span_id): one for one in self.spans()}
        return ended.get(wanted)

    def path_to(self, span: ReadableSpan) -> list[str]:
        """Names of ``span`` and all above it, the topmost first; ``?`` for one that has not ended."""
        above = self.parent_of(span)
        if above is None:
            return [*(["?"] if span.parent is not None else []), span.name]
        return [*self.path_to(above), span.name]

    def readings(self, instrument: Instrument) -> dict[frozenset[tuple[str, Any]], float]:
        """Values by labels; of a histogram how often something was recorded."""
        metrics.sample()
        data = self.reader.get_metrics_data()
        return {
            frozenset((point.attributes or {}).items()): (
                point.count if isinstance(point, HistogramDataPoint) else point.value
            )
            for resource in (data.resource_metrics if data is not None else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == instrument.name
            for point in metric.data.data_points
        }

    def reading(self, instrument: Instrument, **labels: str) -> float:
        """The value under ``labels``; 0 when nothing was recorded there."""
        return self.readings(instrument).get(frozenset(labels.items()), 0)


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[Signals]:
    """Tracing and metrics, on for this test alone."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracing = TracerProvider(id_generator=Identifiers(), shutdown_on_exit=False)
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    metering = MeterProvider([reader], shutdown_on_exit=False)
    # the API lets a process set its provider once, and would keep it for the tests that come after
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: tracing)
    metrics.bind(metering.get_meter("hypha"))
    try:
        yield Signals(exporter, reader)
    finally:
        metrics.unbind()
        metering.shutdown()
        tracing.shutdown()
