"""Log entries as operations.md shows them, and the filter."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import trio
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

import hypha
from hypha.config.reading.log_filter import TRACE, LogFilter, parse_filter
from hypha.net.peers import dialing
from hypha.telemetry.instruments import LOG_ENTRIES
from hypha.telemetry.logs import MAX_TEXT, bind, configure_logging
from hypha.telemetry.logs import logged as bound
from hypha.telemetry.metrics import bind as bind_metrics
from hypha.telemetry.metrics import unbind
from hypha.tracing import operations, span


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    names = ("", "hypha", "hypha.net", "libp2p", "other")
    before = {name: logging.getLogger(name).level for name in names}
    handlers, stderr = logging.getLogger().handlers[:], sys.stderr
    yield
    sys.stderr = stderr
    logging.captureWarnings(False)
    logging.getLogger().handlers[:] = handlers
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def logged(style: str = "json", levels: str = "info") -> tuple[logging.Logger, io.StringIO]:
    sys.stderr = stream = io.StringIO()
    configure_logging("hypha-scheduler", parse_filter(levels), style)  # type: ignore[arg-type]
    return logging.getLogger("hypha.scheduler"), stream


def test_an_entry_like_the_example() -> None:
    logger, stream = logged()
    context = SpanContext(0xA1B2C3D4E5F6, 1, False, TraceFlags(1))
    with trace.use_span(NonRecordingSpan(context)):
        logger.info(
            "Lease %s successfully", "renewed", extra={"lease_id": "550e", "worker_peer_id": "12D3KooW"}
        )
    assert list(json.loads(stream.getvalue()))[:7] == [
        "timestamp", "level", "component", "message", "trace_id", "span_id", "worker_peer_id",
    ]  # fmt: skip
    entry = json.loads(stream.getvalue())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("timestamp"))
    assert entry == {
        "level": "info",
        "component": "hypha-scheduler",
        "message": "Lease renewed successfully",
        "trace_id": "00000000000000000000a1b2c3d4e5f6",
        "span_id": "0000000000000001",
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


#: as the reason for which a peer refuses something
SPOILT = "no\n2026-11-29T00:00:00.000Z ERROR hypha.pki: All is lost.\x1b[2J\x1b]0;t\x07\x9b31m\u202e"


def test_what_a_peer_says_is_no_entry_and_controls_no_terminal() -> None:
    logger, stream = logged("text")
    logger.warning("Refused: %s", SPOILT, extra={"dataset": SPOILT})
    first, second = stream.getvalue().splitlines()
    assert first.endswith(" WARN  hypha.scheduler: Refused: no")
    assert second.startswith("    2026-")
    assert second.isprintable()
    logger, stream = logged("json")
    logger.warning("Refused: %s", SPOILT, extra={"dataset": SPOILT})
    (line,) = stream.getvalue().splitlines()
    assert line.isprintable()
    entry = json.loads(line)
    assert (entry["message"], entry["dataset"]) == (f"Refused: {SPOILT}", SPOILT)


@pytest.mark.parametrize("style", ["json", "text"])
def test_what_a_peer_says_does_not_fill_the_log(style: Literal["json", "text"]) -> None:
    logger, stream = logged(style)
    logger.warning("Refused: %s", "x" * (10 << 20), extra={"dataset": "y" * (10 << 20)})
    assert 2 * MAX_TEXT < len(stream.getvalue()) < 2 * MAX_TEXT + 1000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", LogFilter()),
        ("debug", LogFilter(logging.DEBUG)),
        ("hypha=warn", LogFilter(logging.WARNING)),
        ("hypha=info,hypha_network=debug", LogFilter(logging.INFO, (("hypha.net", logging.DEBUG),))),
        ("error, hypha::net = trace", LogFilter(logging.ERROR, (("hypha.net", TRACE),))),
        ("hypha_scheduler=off", LogFilter(logging.INFO, (("hypha.scheduler", logging.CRITICAL + 10),))),
        ("hypha-network=debug", LogFilter(logging.INFO, (("hypha.net", logging.DEBUG),))),
        (
            "hypha::network::peers::dialing=trace",
            LogFilter(logging.INFO, (("hypha.net.peers.dialing", TRACE),)),
        ),
        ("warn,hypha_network", LogFilter(logging.WARNING, (("hypha.net", TRACE),))),
        ("hypha", LogFilter(TRACE)),
        ("off", LogFilter(logging.CRITICAL + 10)),
        ("info,libp2p=debug", LogFilter(logging.INFO, (("libp2p", logging.DEBUG),))),
    ],
)
def test_filters(text: str, expected: LogFilter) -> None:
    assert parse_filter(text) == expected


@pytest.mark.parametrize("text", ["loud", "hypha=", "=info", "hypha=verbose,info", "hyphen"])
def test_filters_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="no log level"):
        parse_filter(text)


def test_what_a_filter_lets_through() -> None:
    _, stream = logged(levels="hypha=info,hypha_network=debug")
    for name in ("hypha.net.peers.dialing", "hypha.worker", "libp2p", "other"):
        logging.getLogger(name).debug("debug")
        logging.getLogger(name).info("info")
        logging.getLogger(name).warning("warn")
    heard = [(entry["logger"], entry["message"]) for entry in map(json.loads, stream.getvalue().splitlines())]
    assert heard == [
        ("hypha.net.peers.dialing", "debug"),
        ("hypha.net.peers.dialing", "info"),
        ("hypha.net.peers.dialing", "warn"),
        ("hypha.worker", "info"),
        ("hypha.worker", "warn"),
        ("other", "warn"),
    ]


def test_off_silences_libraries_too() -> None:
    logger, stream = logged(levels="off")
    logger.critical("critical")
    logging.getLogger("other").error("error")
    logging.getLogger("libp2p").critical("critical")
    assert stream.getvalue() == ""


def test_bound_fields_are_in_every_entry_and_the_callers_win() -> None:
    logger, stream = logged()
    round_ = 3

    async def task() -> None:
        nonlocal round_
        logger.info("in a task")
        round_ = 4
        bind(lease_id="its own")
        logger.info("later", extra={"job_id": "another"})

    async def main() -> None:
        with bound(job_id="job-1", round=lambda: round_):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(task)
            logger.info("after")
        logger.info("outside")

    trio.run(main)
    names = ("job_id", "round", "lease_id")
    entries = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(one["message"], *(one.get(name) for name in names)) for one in entries] == [
        ("in a task", "job-1", 3, None),
        ("later", "another", 4, "its own"),
        ("after", "job-1", 4, None),
        ("outside", None, None, None),
    ]


def test_the_operation_is_the_spans_or_the_requests() -> None:
    logger, stream = logged()
    with span(operations.RENEW_LEASE):
        logger.info("a")
        with span(operations.REQUEST, {"rpc.method": "RenewLease"}):
            logger.info("b")
        logger.info("c", extra={"operation": "its own"})
    logger.info("d")
    found = [json.loads(line).get("operation") for line in stream.getvalue().splitlines()]
    assert found == ["Renew lease", "RenewLease", "its own", None]


def test_entries_are_counted_by_level() -> None:
    reader = InMemoryMetricReader()
    bind_metrics(MeterProvider([reader]).get_meter("hypha"))
    try:
        logger, _ = logged(levels="debug")
        for level in (logging.INFO, logging.INFO, logging.ERROR, TRACE):
            logger.log(level, "x")
        data = reader.get_metrics_data()
    finally:
        unbind()
    assert data is not None
    counted = {
        point.attributes["level"]: point.value
        for metric in data.resource_metrics[0].scope_metrics[0].metrics
        for point in metric.data.data_points
        if metric.name == LOG_ENTRIES.name
    }
    assert counted == {"info": 2, "error": 1}


def test_what_json_does_not_know() -> None:
    logger, stream = logged()
    logger.info("loss", extra={"loss": float("nan"), "name_": "\ud800"})
    assert json.loads(stream.getvalue(), parse_constant=pytest.fail)["loss"] == "nan"


def test_a_filter_reaches_every_module_by_its_path() -> None:
    """``hypha_network::peers::dialing`` is a logger of its own, below that of its room."""
    source = Path(hypha.__file__).parent
    for path in source.rglob("*.py"):
        room = path.relative_to(source).parts[0].removesuffix(".py")
        for name in re.findall(r"^logger = logging\.getLogger\((.+)\)", path.read_text(), re.MULTILINE):
            assert name == "__name__" or name.strip('"').startswith(f"hypha.{room}"), path
    assert dialing.logger.name == "hypha.net.peers.dialing"
    _, stream = logged(levels="hypha_network=info,hypha::network::peers::dialing=debug")
    dialing.logger.debug("heard")
    logging.getLogger("hypha.net.peers.table").debug("not heard")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["heard"]


# --- standard error -----------------------------------------------------------------------------------

_PROGRAM = """\
import sys, os, logging, time
from hypha.config.reading.log_filter import parse_filter
from hypha.telemetry.logs import configure_logging
configure_logging("hypha-worker", parse_filter("info"), "{style}")
logger = logging.getLogger("hypha.worker")
"""


def program(style: str, text: str) -> list[str]:
    return [sys.executable, "-c", _PROGRAM.replace("{style}", style) + text]


def test_a_reader_that_is_gone_ends_nobody() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    text = "for _ in range(500): logger.error('x' * 500)\nprint('alive')"
    done = subprocess.run(program("json", text), stderr=writing, stdout=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, b"alive\n")


def test_closed_and_full_ones_end_nobody() -> None:
    text = "os.close(2)\nlogger.error('x')\nsys.stderr.close()\nlogger.error('x')\nprint('alive')"
    done = subprocess.run(program("text", text), capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"alive\n")
    with open("/dev/full", "wb") as full:
        text = "logger.error('x')\nprint('alive')"
        done = subprocess.run(program("json", text), stderr=full, stdout=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"alive\n")


def test_a_reader_that_stops_holds_up_nobody_and_is_told_what_it_missed() -> None:
    text = (
        "for number in range(1000): logger.error('%d %s', number, 'x' * 1000)\n"
        "print('written', flush=True)\n"
        "sys.stdin.readline()\n"
        "logger.error('again')\n"
    )
    with subprocess.Popen(
        program("json", text), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        assert running.stderr is not None
        # nobody has read a byte of the megabyte
        assert running.stdout.readline() == b"written\n"
        first = os.read(running.stderr.fileno(), 1 << 20)
        running.stdin.write(b"\n")
        running.stdin.flush()
        rest = running.stderr.read()
        assert running.wait(30) == 0
    lines = (first + rest).splitlines()
    whole = [line for line in lines if line.startswith(b"{") and line.endswith(b"}")]
    messages = [json.loads(line)["message"] for line in whole]
    assert messages[-1] == "again"
    found = re.fullmatch(r"(\d+) log entries were lost: standard error took none\.", messages[-2])
    assert found
    assert len(messages) - 2 + int(found[1]) == 1000


def test_an_entry_that_cannot_be_formatted_is_named() -> None:
    text = "logger.error('%d', 'x')\nlogger.error('next')"
    done = subprocess.run(program("json", text), stderr=subprocess.PIPE, timeout=60)
    first, second = (json.loads(line) for line in done.stderr.splitlines())
    assert re.fullmatch(r"An entry at <string>:\d+ cannot be written: TypeError", first["message"])
    assert second["message"] == "next"


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colour_on_a_terminal_only(variables: dict[str, str], coloured: bool) -> None:
    leader, follower = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment |= {"TERM": "xterm", **variables}
    command = program("text", "logger.warning('Slow.', extra={'peer_id': '12D3'})")
    subprocess.run(command, stderr=follower, env=environment, timeout=60)
    os.close(follower)
    shown = os.read(leader, 4096).decode()
    os.close(leader)
    assert ("\x1b[33mWARN \x1b[0m" in shown) is coloured
    plain = re.sub(r"\x1b\[\d+m", "", shown)
    assert re.fullmatch(r"\S+Z WARN  hypha\.worker: Slow\. peer_id=12D3\r\n", plain)
    piped = subprocess.run(command, stderr=subprocess.PIPE, env=environment, timeout=60)
    assert b"\x1b" not in piped.stderr
