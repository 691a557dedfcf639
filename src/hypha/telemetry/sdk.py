"""OpenTelemetry's SDK, where the operator wants telemetry; imported only then.

:class:`Telemetry` makes tracing, metrics and logs of this process go where the settings say, and gives the
metrics that Prometheus may ask for. Nothing here is in the way of the node: spans and logs wait in
bounded queues that drop what is too much, exporters work in threads of their own, a collector that is down is
reported once, and :meth:`Telemetry.close` takes two seconds at most.

The library's own exporters write a line for each batch that fails. Here its loggers are silent; whether a
batch was taken is read off what ``export`` returns, so there is one warning when a collector begins to fail,
with the library's last reason, and one line when it takes telemetry again.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.instrumentation.logging.handler import LoggingHandler
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanLimits, TracerProvider, sampling
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from prometheus_client import CollectorRegistry

from hypha.config.otel import Signal, TelemetrySettings, shown_endpoint
from hypha.messages import FinishedSpan
from hypha.telemetry import metrics
from hypha.telemetry.instruments import EXPORT_FAILURES
from hypha.telemetry.logs import ContextFilter, unreadable
from hypha.tracing import MAX_TEXT, chosen_identifiers, span_context_of

logger = logging.getLogger(__name__)

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
#: signal -> (module below the protocol's package, class)
_MODULES = {
    "traces": ("trace_exporter", "OTLPSpanExporter"),
    "metrics": ("metric_exporter", "OTLPMetricExporter"),
    "logs": ("_log_exporter", "OTLPLogExporter"),
}
_PACKAGES = {"grpc": "proto.grpc", "http/protobuf": "proto.http", "http/json": "json.http"}


# --- exporters ------------------------------------------------------------------------------------------


def make_exporter(signal: str, settings: Signal, timeout_s: float) -> Any:
    """The exporter of ``signal``; an export that takes longer than ``timeout_s`` has failed."""
    module, name = _MODULES[signal]
    package = f"opentelemetry.exporter.otlp.{_PACKAGES[settings.protocol]}.{module}"
    make = getattr(importlib.import_module(package), name)
    headers = dict(settings.headers)
    exporter = make(endpoint=settings.endpoint, headers=headers, timeout=timeout_s)
    watched = _Watched(signal, shown_endpoint(settings.endpoint), exporter.export)
    exporter.export = watched.export
    return exporter


class _LastWords(logging.Handler):
    """Keeps what the library logged last, and shows it to nobody else."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


_last_words = _LastWords()
_library = logging.getLogger("opentelemetry")
_library.handlers[:] = [_last_words]
_library.setLevel(logging.WARNING)
_library.propagate = False


class _Watched:
    """Calls ``export``; all of a process's exports of one signal happen in one thread."""

    def __init__(self, signal: str, endpoint: str, export: Any) -> None:
        self._signal = signal
        self._endpoint = endpoint
        self._export = export
        self._failing = False

    def export(self, *args: Any, **kwargs: Any) -> Any:
        """As the exporter's own. Raises what that raises."""
        _last_words.text = ""
        try:
            result = self._export(*args, **kwargs)
        except Exception as exc:
            self._failed(repr(exc))
            raise
        if getattr(result, "name", "SUCCESS") == "SUCCESS":
            self._worked()
        else:
            self._failed(_last_words.text)
        return result

    def _failed(self, reason: str) -> None:
        EXPORT_FAILURES.add(signal=self._signal)
        if not self._failing:
            self._failing = True
            logger.warning(
                "The collector at %s does not take %s: %s What is made meanwhile is dropped.",
                self._endpoint,
                self._signal,
                f"{reason.rstrip('. ')}." if reason else "it gave no reason.",
            )

    def _worked(self) -> None:
        if self._failing:
            self._failing = False
            logger.warning("The collector at %s takes %s again.", self._endpoint, self._signal)


# --- what is exported -----------------------------------------------------------------------------------


class ExecutorSpanExport:
    """Gives spans of executors to ``processor``: they have no collector, and no secret of one. The service is
    ``hypha-executor``; all else of the ``resource`` is the worker's.
    """

    def __init__(self, processor: BatchSpanProcessor, resource: Resource) -> None:
        self._processor = processor
        self._resource = resource.merge(Resource({"service.name": "hypha-executor"}))
        self._scope = InstrumentationScope("hypha")

    def emit(self, spans: Sequence[FinishedSpan]) -> None:
        """Export ``spans``; never blocks. One whose identifiers are none is left out."""
        for one in spans:
            if (context := _context(one.trace_id, one.span_id)) is not None:
                self._processor.on_end(self._readable(one, context))

    def _readable(self, one: FinishedSpan, context: SpanContext) -> ReadableSpan:
        return ReadableSpan(
            name=one.name,
            context=context,
            parent=_context(one.trace_id, one.parent_id) if one.parent_id else None,
            resource=self._resource,
            attributes=one.attributes,
            events=[Event(event.name, event.attributes, event.time_ns) for event in one.events],
            links=[Link(link) for text in one.links if (link := span_context_of(text)) is not None],
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


class Identifiers(RandomIdGenerator):
    """Random ones, unless whoever starts the span has chosen them (:mod:`hypha.tracing`)."""

    def generate_trace_id(self) -> int:
        chosen = chosen_identifiers()
        return chosen[0] if chosen is not None else super().generate_trace_id()

    def generate_span_id(self) -> int:
        chosen = chosen_identifiers()
        return chosen[1] if chosen is not None else super().generate_span_id()


class _Exporting(LoggingHandler):
    """An entry that cannot be read ends nobody: another one says where it is."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except Exception as exc:  # noqa: BLE001 - the edge: whoever logs must not fail for it
            super().emit(unreadable(record, exc))


# --- the process ----------------------------------------------------------------------------------------


class Telemetry:
    """What was started; :meth:`close` it. A process has one at a time; its tracer provider stays
    OpenTelemetry's global one for good.
    """

    def __init__(self, settings: TelemetrySettings) -> None:
        resource = Resource.create(dict(settings.attributes))
        self._closers: list[Callable[[], object]] = []
        self._handler: logging.Handler | None = None
        #: the metrics that Prometheus may ask for, where they are on
        self.scraped: CollectorRegistry | None = None
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
            # one of our own: libraries count in the default one
            self.scraped = CollectorRegistry()
            readers.append(PrometheusMetricReader(scope_info_enabled=False, registry=self.scraped))
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


def _quietly(close: Callable[[], Any]) -> None:
    try:
        close()
    except Exception as exc:  # noqa: BLE001 - a collector's failure is none of the node's
        logging.getLogger("hypha.telemetry").debug("Telemetry was not closed in order: %r", exc)
