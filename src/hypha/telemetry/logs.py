"""Logs: one entry a line, JSON or text, on standard error.

Libraries are logged from ``warn`` on (libp2p from ``error`` on) unless the filter names them. What belongs to
all entries of a task and of those that it starts is bound once, with :func:`bind` or :func:`logged`; the
operation is that of the span which is current. Standard error may be closed, broken, full or stuck: then
entries are lost, which is logged when it takes some again, and nothing else happens.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal, TextIO

from opentelemetry import trace

from hypha.config.environment import variable
from hypha.config.reading.log_filter import TRACE, LogFilter
from hypha.naming import cleaned, legible, name_of, named
from hypha.telemetry.instruments import LOG_ENTRIES
from hypha.tracing import current_operation

#: What every LogRecord has, so that the rest is what the caller gave with ``extra=``.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
#: fields of the specification, in its order; others follow
_FIRST = ("worker_peer_id", "lease_id", "job_id", "round", "operation")
#: fields that hold a PeerID, and where its name goes
_NAMED = {"worker_peer_id": "worker_name", "peer_id": "peer_name"}
_COLOURS = {"error": "31", "warn": "33", "info": "32", "debug": "34", "trace": "2"}
#: Characters of an entry's message, and of each of its fields, that are written: peers have a part in them.
MAX_TEXT = 64 << 10
#: What a terminal obeys, or what turns the direction of text round, and JSON does not escape by itself.
_CONTROLS = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
#: what a pipe takes at once if it takes anything
_PIECE_BYTES = select.PIPE_BUF

Field = str | int | float | bool | None
#: a field, or a function that is asked for it with every entry; ``None`` is in none
Bound = Field | Callable[[], Field]

_bound: ContextVar[Mapping[str, Bound]] = ContextVar("bound fields", default={})  # noqa: B039 - never changed


def bind(**fields: Bound) -> None:
    """Have ``fields`` in all entries of this task from now on, and of the tasks that it starts."""
    _bound.set({**_bound.get(), **fields})


@contextlib.contextmanager
def logged(**fields: Bound) -> Iterator[None]:
    """Have ``fields`` in all entries meanwhile, also of tasks that are started meanwhile."""
    token = _bound.set({**_bound.get(), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


class ContextFilter(logging.Filter):
    """Adds the bound fields and the operation to each record, where its caller did not set them. For any
    handler; lets everything through.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        own = vars(record)
        for name, value in _bound.get().items():
            found = value() if callable(value) else value
            if name not in own and found is not None:
                own[name] = found
        if "operation" not in own and (operation := current_operation()) is not None:
            own["operation"] = operation
        return True


def _count(record: logging.LogRecord) -> bool:
    LOG_ENTRIES.add(level=level_name(record.levelno))
    return True


class _StandardError(logging.Handler):
    """Writes to what ``sys.stderr`` is at that moment: a live display puts itself in its place."""

    def __init__(self) -> None:
        super().__init__()
        self._lost = 0
        self._torn = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception as exc:  # noqa: BLE001 - the edge: an entry that cannot be written ends nobody
            text = self.format(unreadable(record, exc))
        stream: TextIO | None = sys.stderr
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if stream is not sys.__stderr__:
                if stream is not None:
                    stream.write(f"{text}\n")
                    stream.flush()
            elif stream is not None:
                self._write(stream.fileno(), text)

    def _write(self, fd: int, text: str) -> None:
        """Past Python's buffer, where what could not be written would stay, and spoil the exit code."""
        if self._lost:
            lost = logging.makeLogRecord(
                {
                    "name": "hypha.telemetry",
                    "levelno": logging.WARNING,
                    "msg": f"{self._lost} log entries were lost: standard error took none.",
                }
            )
            text = f"{self.format(lost)}\n{text}"
        data = f"{chr(10) if self._torn else ''}{text}\n".encode(errors="backslashreplace")
        if left := _unwritten(fd, data):
            self._lost += 1
            self._torn = self._torn or left < len(data)
        else:
            self._lost, self._torn = 0, False


def _unwritten(fd: int, data: bytes) -> int:
    """Write ``data`` without waiting, as whoever reads may have stopped; how many bytes were not written."""
    left = memoryview(data)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    with contextlib.suppress(OSError):
        while left and poll.poll(0):
            left = left[os.write(fd, left[:_PIECE_BYTES]) :]
    return len(left)


def unreadable(record: logging.LogRecord, exc: Exception) -> logging.LogRecord:
    """An entry that says that ``record`` could not be written."""
    return logging.makeLogRecord(
        {
            "name": record.name,
            "levelno": record.levelno,
            "msg": f"An entry at {record.pathname}:{record.lineno} cannot be written: {type(exc).__name__}",
        }
    )


class JsonFormatter(logging.Formatter):
    """One JSON object a line: timestamp, level, component, message, trace_id and span_id in a span, the
    fields of the specification where they apply, the logger, and what else the caller gave. Beside a PeerID
    stands its name, where it is known.
    """

    def __init__(self, component: str) -> None:
        super().__init__()
        self.component = component

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "timestamp": _timestamp(record),
            "level": level_name(record.levelno),
            "component": self.component,
            "message": named(_cut(record.getMessage())),
            **current_span_ids(),
        }
        fields = _fields(record)
        # a field may not pass itself off as the entry's own
        for name in (*_FIRST, *fields):
            if name in fields:
                entry.setdefault(name, _plain(fields[name]))
                if name in _NAMED and (known := name_of(str(fields[name]))):
                    entry.setdefault(_NAMED[name], known)
        entry.setdefault("logger", record.name)
        if record.exc_info:
            entry["exception"] = _exception(record)
        text = json.dumps(entry, default=str, ensure_ascii=False)
        return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class TextFormatter(logging.Formatter):
    """The same for eyes: time, level, logger, message, fields; with ``colour`` by level. Further lines of an
    entry are indented, so that none of them looks like another entry, whoever wrote it.
    """

    def __init__(self, colour: Callable[[], bool] = lambda: False) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        written = (f" {name}={_in_a_line(str(value))}" for name, value in _fields(record).items())
        fields = named("".join(written))
        time, level, name = _timestamp(record), level_name(record.levelno), record.name
        shown = f"{level.upper():5}"
        if self._colour():
            time, shown, name = _painted("2", time), _painted(_COLOURS[level], shown), _painted("2", name)
            fields = _painted("2", fields) if fields else ""
        text = f"{time} {shown} {name}: {_lines(named(_cut(record.getMessage())))}{fields}"
        return f"{text}\n{_lines(_exception(record))}" if record.exc_info else text


def _painted(colour: str, text: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m"


def wants_colour(stream: TextIO | None) -> bool:
    """Whether ``stream`` is a terminal whose user has not declined colours (``NO_COLOR``, ``TERM=dumb``)."""
    if variable("NO_COLOR") or variable("TERM") == "dumb":
        return False
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        # it is closed
        return False


def level_name(level: int) -> str:
    """``error | warn | info | debug | trace`` for a stdlib level."""
    if level >= logging.ERROR:
        return "error"
    if level >= logging.WARNING:
        return "warn"
    if level >= logging.INFO:
        return "info"
    return "debug" if level >= logging.DEBUG else "trace"


def current_span_ids() -> dict[str, str]:
    """``trace_id`` and ``span_id`` of the current span, in hex, if there is one."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": format(context.trace_id, "032x"), "span_id": format(context.span_id, "016x")}


def configure_logging(component: str, levels: LogFilter, style: Literal["json", "text"]) -> None:
    """Send all logs of this process to standard error; earlier handlers are dropped."""
    logging.addLevelName(TRACE, "TRACE")
    handler = _StandardError()
    handler.addFilter(ContextFilter())
    handler.addFilter(_count)
    text = TextFormatter(lambda: wants_colour(sys.stderr))
    handler.setFormatter(JsonFormatter(component) if style == "json" else text)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    # who wants less of Hypha does not want more of others
    root.setLevel(max(logging.WARNING, levels.level))
    logging.getLogger("hypha").setLevel(levels.level)
    logging.getLogger("libp2p").setLevel(max(logging.ERROR, levels.level))
    for name, level in levels.loggers:
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)


def _timestamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _plain(value: object) -> object:
    """JSON knows no NaN and no infinity."""
    if isinstance(value, str):
        return _cut(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text)} characters)"


def _in_a_line(text: str) -> str:
    text = text[:MAX_TEXT]
    return text if text.isprintable() else cleaned(text, MAX_TEXT)


def _lines(text: str) -> str:
    return legible(text).replace("\n", "\n    ")


def _exception(record: logging.LogRecord) -> str:
    buffer = io.StringIO()
    if record.exc_info:
        traceback.print_exception(*record.exc_info, file=buffer)
    return buffer.getvalue().rstrip()
