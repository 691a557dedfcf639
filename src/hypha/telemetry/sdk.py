"""OpenTelemetry's SDK, where the operator wants telemetry; imported only then.

:func:`start_telemetry` makes tracing, metrics and logs of this process go where the settings say, and gives
the metrics that Prometheus may ask for. Nothing here is in the way of the node: spans and logs wait in
bounded queues that drop what is too much, exporters work in threads of their own, a collector that is down is
reported once, and :meth:`Telemetry.close` takes two seconds at most.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.instrumentation.logging.handler import LoggingHandler
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider, sampling
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

from hypha.config.otel import Signal, TelemetrySettings
from hypha.telemetry import metrics
from hypha.telemetry.executors import ExecutorSpanExport
from hypha.telemetry.exporters import make_exporter
from hypha.telemetry.http.exposition import Exposition
from hypha.telemetry.logs import ContextFilter, unreadable
from hypha.tracing.spans import MAX_TEXT, chosen_identifiers

#: what is not sent by then, once the node has ended, is given up
CLOSE_S = 2.0
#: an export that takes longer is given up
EXPORT_S = 10.0

_SAMPLERS: Mapping[str, Callable[[float], sampling.Sampler]] = {
    "always_on": lambda ratio: sampling.ALWAYS_ON,
    "always_off": lambda ratio: sampling.ALWAYS_OFF,
    "traceidratio": sampling.TraceIdRatioBased,
    "parentbased_always_on": lambda ratio: sampling.DEFAULT_ON,
    "parentbased_always_off": lambda ratio: sampling.DEFAULT_OFF,
    "parentbased_traceidratio": sampling.ParentBasedTraceIdRatio,
}


class Identifiers(RandomIdGenerator):
    """Random ones, unless whoever starts the span has chosen them (:mod:`hypha.tracing.identifiers`)."""

    def generate_trace_id(self) -> int:
        """Of a trace that begins here."""
        chosen = chosen_identifiers()
        return chosen[0] if chosen is not None else super().generate_trace_id()

    def generate_span_id(self) -> int:
        """Of any span."""
        chosen = chosen_identifiers()
        return chosen[1] if chosen is not None else super().generate_span_id()


class _Exporting(LoggingHandler):
    """An entry that cannot be read ends nobody: another one says where it is."""

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging."""
        try:
            super().emit(record)
        except Exception as exc:  # noqa: BLE001 - the edge: whoever logs must not fail for it
            super().emit(unreadable(record, exc))


class Telemetry:
    """What was started; :meth:`close` it. ``exposition`` gives the metrics to whoever scrapes them.

    A process has one at a time; its tracer provider stays OpenTelemetry's global one for good.
    """

    def __init__(self, settings: TelemetrySettings) -> None:
        resource = Resource.create(dict(settings.attributes))
        self._closers: list[Callable[[], object]] = []
        self._handler: logging.Handler | None = None
        self.exposition: Exposition | None = None
        #: exports spans of executors, where traces are sent
        self.executor_spans: ExecutorSpanExport | None = None
        if settings.traces is not None:
            self._trace(settings, settings.traces, resource)
        if settings.metrics is not None or settings.scraped:
            self._measure(settings, resource)
        if settings.logs is not None:
            self._log(settings.logs, resource)

    def _trace(self, settings: TelemetrySettings, signal: Signal, resource: Resource) -> None:
        sampler = _SAMPLERS[settings.sampler](settings.ratio)
        # what peers write gets into attributes
        limits = SpanLimits(max_attribute_length=MAX_TEXT, max_span_attribute_length=MAX_TEXT)
        provider = TracerProvider(
            sampler, resource, shutdown_on_exit=False, id_generator=Identifiers(), span_limits=limits
        )
        processor = BatchSpanProcessor(make_exporter("traces", signal, EXPORT_S))
        provider.add_span_processor(processor)
        self.executor_spans = ExecutorSpanExport(processor, resource)
        trace.set_tracer_provider(provider)
        self._closers.append(provider.shutdown)

    def _measure(self, settings: TelemetrySettings, resource: Resource) -> None:
        readers: list[MetricReader] = []
        if settings.metrics is not None:
            exporter = make_exporter("metrics", settings.metrics, EXPORT_S)
            readers.append(
                PeriodicExportingMetricReader(exporter, settings.interval_s * 1000, EXPORT_S * 1000)
            )
        if settings.scraped:
            self.exposition = Exposition()
            readers.append(self.exposition.reader)
        provider = MeterProvider(readers, resource, shutdown_on_exit=False)
        metrics.bind(provider.get_meter("hypha"))
        self._closers.append(provider.shutdown)

    def _log(self, signal: Signal, resource: Resource) -> None:
        provider = LoggerProvider(resource, shutdown_on_exit=False)
        provider.add_log_record_processor(BatchLogRecordProcessor(make_exporter("logs", signal, EXPORT_S)))
        self._handler = _Exporting(logger_provider=provider)
        self._handler.addFilter(ContextFilter())
        logging.getLogger("hypha").addHandler(self._handler)
        self._closers.append(provider.shutdown)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Send what waits, for at most ``timeout_s``; may be called twice. Blocks."""
        closers, self._closers = self._closers, []
        metrics.sample()
        if self._handler is not None:
            logging.getLogger("hypha").removeHandler(self._handler)
        # each may hang on its collector: whatever is not done in time ends with the process
        threads = [threading.Thread(target=_quietly, args=(one,), daemon=True) for one in closers]
        for thread in threads:
            thread.start()
        until = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        metrics.unbind()


def start_telemetry(settings: TelemetrySettings) -> Telemetry:
    """Send and show what ``settings`` say, from now on."""
    return Telemetry(settings)


def _quietly(close: Callable[[], Any]) -> None:
    try:
        close()
    except Exception as exc:  # noqa: BLE001 - a collector's failure is none of the node's
        logging.getLogger("hypha.telemetry").debug("Telemetry was not closed in order: %r", exc)
