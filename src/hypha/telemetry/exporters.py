"""OTLP exporters, one for each signal and protocol, that report a collector which fails once and not again.

The library's own exporters write a line for each batch that fails. Here its loggers are silent; whether a
batch was taken is read off what ``export`` returns, so there is one warning when a collector begins to fail,
with the library's last reason, and one line when it takes telemetry again.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from hypha.config.otel import Signal, shown_endpoint
from hypha.telemetry.instruments import EXPORT_FAILURES

logger = logging.getLogger(__name__)

#: signal -> (module below the protocol's package, class)
_MODULES = {
    "traces": ("trace_exporter", "OTLPSpanExporter"),
    "metrics": ("metric_exporter", "OTLPMetricExporter"),
    "logs": ("_log_exporter", "OTLPLogExporter"),
}
_PACKAGES = {"grpc": "proto.grpc", "http/protobuf": "proto.http", "http/json": "json.http"}


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
