"""Telemetry for as long as a component runs: started from its configuration, gauges read once a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import trio

from hypha.config.otel import TelemetrySettings
from hypha.telemetry.metrics import sample

if TYPE_CHECKING:
    from hypha.telemetry.exposition import Exposition

#: seconds between two readings of the gauges
SAMPLE_S = 1.0

_exposition: ContextVar[Callable[[], Exposition | None]] = ContextVar("exposition", default=lambda: None)


@contextmanager
def telemetry(settings: TelemetrySettings) -> Iterator[None]:
    """Telemetry as ``settings`` say; nothing of OpenTelemetry's SDK is imported where they say none.

    Takes up to two seconds to leave. To be entered outside of trio's loop, which it would hold up.
    """
    if not settings.on:
        yield
        return
    from hypha.telemetry.sdk import start_telemetry

    started = start_telemetry(settings)
    token = _exposition.set(lambda: started.exposition)
    try:
        yield
    finally:
        _exposition.reset(token)
        started.close()


def exposition() -> Exposition | None:
    """What Prometheus may ask this process for; ``None`` where metrics are off."""
    return _exposition.get()()


async def keep_sampling() -> None:
    """Read the gauges once a second, until cancelled."""
    while True:
        sample()
        await trio.sleep(SAMPLE_S)
