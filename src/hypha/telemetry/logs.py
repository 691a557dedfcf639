"""Logs: one entry a line, JSON or text, on standard error.

Libraries are heard from ``warn`` on (libp2p from ``error`` on) unless the filter names them.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Literal, TextIO

from opentelemetry import trace

from hypha.config.log_filter import TRACE, LogFilter

#: What every LogRecord has, so that the rest is what the caller said with ``extra=``.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at that moment: a live display puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: timestamp, level, component, message, trace_id in a span, the fields."""

    def __init__(self, component: str) -> None:
        super().__init__()
        self.component = component

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "timestamp": _timestamp(record),
            "level": level_name(record.levelno),
            "component": self.component,
            "message": record.getMessage(),
        }
        if (trace_id := current_trace_id()) is not None:
            entry["trace_id"] = trace_id
        entry["logger"] = record.name
        for name, value in _fields(record).items():
            # a field may not pass itself off as the entry's own
            entry.setdefault(name, value)
        if record.exc_info:
            entry["exception"] = _exception(record)
        return json.dumps(entry, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """The same for eyes: time, level, logger, message, fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        head = f"{_timestamp(record)} {level_name(record.levelno).upper():5} {record.name}:"
        text = f"{head} {record.getMessage()}{fields}"
        return f"{text}\n{_exception(record)}" if record.exc_info else text


def level_name(level: int) -> str:
    """``error | warn | info | debug | trace`` for a stdlib level."""
    if level >= logging.ERROR:
        return "error"
    if level >= logging.WARNING:
        return "warn"
    if level >= logging.INFO:
        return "info"
    return "debug" if level >= logging.DEBUG else "trace"


def current_trace_id() -> str | None:
    """Hex trace id of the current span, if there is one."""
    context = trace.get_current_span().get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else None


def configure_logging(
    component: str,
    levels: LogFilter,
    style: Literal["json", "text"] = "json",
    stream: TextIO | None = None,
) -> None:
    """Send all logs of this process to ``stream`` (standard error); earlier handlers are dropped."""
    logging.addLevelName(TRACE, "TRACE")
    handler = _StandardError() if stream is None else logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(component) if style == "json" else TextFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("hypha").setLevel(levels.level)
    logging.getLogger("libp2p").setLevel(logging.ERROR)
    for name, level in levels.loggers:
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)


def _timestamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _exception(record: logging.LogRecord) -> str:
    buffer = io.StringIO()
    if record.exc_info:
        traceback.print_exception(*record.exc_info, file=buffer)
    return buffer.getvalue().rstrip()
