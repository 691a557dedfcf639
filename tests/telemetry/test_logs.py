"""Log entries as operations.md shows them, and the filter."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from hypha.config.log_filter import TRACE, LogFilter, parse_filter
from hypha.telemetry.logs import configure_logging


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    names = ("", "hypha", "hypha.net", "libp2p", "other")
    before = {name: logging.getLogger(name).level for name in names}
    handlers = logging.getLogger().handlers[:]
    yield
    logging.captureWarnings(False)
    logging.getLogger().handlers[:] = handlers
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def logged(style: str = "json", levels: str = "info") -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    configure_logging("hypha-scheduler", parse_filter(levels), style, stream)  # type: ignore[arg-type]
    return logging.getLogger("hypha.scheduler"), stream


def test_an_entry_like_the_example() -> None:
    logger, stream = logged()
    context = SpanContext(0xA1B2C3D4E5F6, 1, False, TraceFlags(1))
    with trace.use_span(NonRecordingSpan(context)):
        logger.info(
            "Lease %s successfully", "renewed", extra={"worker_peer_id": "12D3KooW", "lease_id": "550e"}
        )
    entry = json.loads(stream.getvalue())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("timestamp"))
    assert entry == {
        "level": "info",
        "component": "hypha-scheduler",
        "message": "Lease renewed successfully",
        "trace_id": "00000000000000000000a1b2c3d4e5f6",
        "logger": "hypha.scheduler",
        "worker_peer_id": "12D3KooW",
        "lease_id": "550e",
    }


def test_no_trace_id_without_a_span_and_one_line_whatever_is_said() -> None:
    logger, stream = logged()
    try:
        raise ValueError("bad\nvalue")
    except ValueError:
        logger.exception("It failed:\nbadly", extra={"component": "an impostor", "odd": {1, 2}})
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert "trace_id" not in entry
    assert entry["component"] == "hypha-scheduler"
    assert (entry["level"], entry["odd"]) == ("error", "{1, 2}")
    assert "ValueError: bad\nvalue" in entry["exception"]


def test_level_names() -> None:
    logger, stream = logged(levels="trace")
    for level in (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG, TRACE):
        logger.log(level, "x")
    levels = [json.loads(line)["level"] for line in stream.getvalue().splitlines()]
    assert levels == ["error", "error", "warn", "info", "debug", "trace"]


def test_text() -> None:
    logger, stream = logged("text")
    logger.warning("Slow.", extra={"peer_id": "12D3"})
    assert re.fullmatch(r"\S+Z WARN  hypha\.scheduler: Slow\. peer_id=12D3\n", stream.getvalue())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", LogFilter()),
        ("debug", LogFilter(logging.DEBUG)),
        ("hypha=warn", LogFilter(logging.WARNING)),
        ("hypha=info,hypha_network=debug", LogFilter(logging.INFO, (("hypha.net", logging.DEBUG),))),
        ("error, hypha::net = trace", LogFilter(logging.ERROR, (("hypha.net", TRACE),))),
        ("hypha_scheduler=off", LogFilter(logging.INFO, (("hypha.scheduler", logging.CRITICAL + 10),))),
        ("info,libp2p=debug", LogFilter(logging.INFO, (("libp2p", logging.DEBUG),))),
    ],
)
def test_filters(text: str, expected: LogFilter) -> None:
    assert parse_filter(text) == expected


@pytest.mark.parametrize("text", ["loud", "hypha=", "=info", "hypha=verbose,info"])
def test_filters_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="no log level"):
        parse_filter(text)


def test_what_a_filter_lets_through() -> None:
    _, stream = logged(levels="hypha=info,hypha_network=debug")
    for name in ("hypha.net.dialing", "hypha.worker", "libp2p", "other"):
        logging.getLogger(name).debug("debug")
        logging.getLogger(name).info("info")
        logging.getLogger(name).warning("warn")
    heard = [(entry["logger"], entry["message"]) for entry in map(json.loads, stream.getvalue().splitlines())]
    assert heard == [
        ("hypha.net.dialing", "debug"),
        ("hypha.net.dialing", "info"),
        ("hypha.net.dialing", "warn"),
        ("hypha.worker", "info"),
        ("hypha.worker", "warn"),
        ("other", "warn"),
    ]
