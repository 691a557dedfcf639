"""Traces: the operations there are (``operations``), and spans of them (``spans``). Only OpenTelemetry's API
is used here; the SDK, where tracing is on, is :mod:`hypha.telemetry`'s, and an executor's spans go to its
worker over the bridge.
"""

from hypha.tracing.spans import (
    event,
    failed,
    hop_traceparent,
    round_traceparent,
    span,
    start_span,
    trace_context,
    traceparent,
    untraced,
)

__all__ = [
    "event",
    "failed",
    "hop_traceparent",
    "round_traceparent",
    "span",
    "start_span",
    "trace_context",
    "traceparent",
    "untraced",
]
