"""Telemetry for as long as a component runs: started from its configuration, gauges read regularly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import trio

from hypha.config.otel import TelemetrySettings
from hypha.messages import FinishedSpan
from hypha.telemetry.metrics import sample

if TYPE_CHECKING:
    from hypha.telemetry.sdk import Telemetry

#: seconds between two readings of the gauges: a third of those between two exports, within these bounds
LEAST_SAMPLE_S, MOST_SAMPLE_S = 1.0, 5.0

#: what was started in this process
_started: ContextVar[Telemetry | None] = ContextVar("telemetry", default=None)


@contextmanager
def telemetry(settings: TelemetrySettings) -> Iterator[None]:
    """Telemetry as ``settings`` say; nothing of OpenTelemetry's SDK is imported where they say none.

    Takes up to two seconds to leave. To be entered outside of trio's loop, which it would hold up.
    """
    if not settings.on:
        yield
        return
    from hypha.telemetry.sdk import Telemetry

    started = Telemetry(settings)
    token = _started.set(started)
    try:
        yield
    finally:
        _started.reset(token)
        started.close()


def exposition() -> Callable[[str], tuple[bytes, str]] | None:
    """Gives the metrics as Prometheus asks for them: of the kind that a header ``accept`` says, the body and
    its content type. Blocks for some milliseconds. ``None`` where metrics are off.
    """
    started = _started.get()
    if started is None or (registry := started.scraped) is None:
        return None
    from prometheus_client.exposition import choose_encoder

    def write(accept: str) -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    return write


def emit_spans() -> Callable[[Sequence[FinishedSpan]], None] | None:
    """What exports the spans of executors; ``None`` where no traces are sent."""
    started = _started.get()
    return None if started is None or started.executor_spans is None else started.executor_spans.emit


async def keep_sampling(interval_s: float) -> None:
    """Read the gauges of a process that exports them every ``interval_s``, until cancelled. Whoever scrapes
    them has them read at that moment.
    """
    every_s = min(max(interval_s / 3, LEAST_SAMPLE_S), MOST_SAMPLE_S)
    while True:
        sample()
        await trio.sleep(every_s)
