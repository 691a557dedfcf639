"""Spans: what is done, in which operation (``operations``), and by which peer it was asked for. Only
OpenTelemetry's API is used here; the SDK, where tracing is on, is :mod:`hypha.telemetry`'s, and an executor's
spans go to its worker over the bridge.

A span costs a function call while tracing is off. Names are those of :mod:`hypha.tracing.operations`. Trio's
tasks inherit the current span: start tasks that outlive an operation outside of it.

Some identifiers several processes agree on without asking each other. A round of a job is one trace. Workers
train, the parameter server sums and the scheduler plans at the same time, and who joins late has not heard
where the trace began: so its identifiers follow from the job, its generation and the round. Whether it is
recorded is decided like anywhere else, by a share of all traces (OpenTelemetry's ``TraceIdRatioBased``: of
the lower 64 bits of the trace's identifier), which the scheduler names when it dispatches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from hashlib import blake2b
from typing import TYPE_CHECKING

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from hypha.tracing.operations import Operation

#: what attributes may be
Attribute = str | bool | int | float | Sequence[str]

_SPAN_BYTES, _TRACE_BYTES = 8, 16
#: characters that one text of a span may have
MAX_TEXT = 1024

_propagator = TraceContextTextMapPropagator()
#: a provider and its tracer
_made: tuple[trace.TracerProvider, trace.Tracer] | None = None
#: identifiers (trace, span) that the next span of this task is to have
_chosen: ContextVar[tuple[int, int] | None] = ContextVar("chosen identifiers", default=None)
#: what is going on, whether it is traced or not: log entries say it
_operation: ContextVar[str | None] = ContextVar("operation", default=None)


def current_operation() -> str | None:
    """The operation that goes on here; of a request or an answer the name of its type."""
    return _operation.get()


def traceparent() -> str | None:
    """The W3C ``traceparent`` of the current span, if there is one."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get("traceparent")


def context_of(parent: str | None) -> Context | None:
    """The context that a ``traceparent`` names; ``None`` (the current one) without. Garbage begins a new
    trace.
    """
    return _propagator.extract({"traceparent": parent}, contexts.Context()) if parent else None


@contextlib.contextmanager
def trace_context(parent: str | None) -> Iterator[None]:
    """The span that ``parent``, a ``traceparent``, names is the current one meanwhile."""
    if parent is None:
        yield
        return
    # an empty context is false, and yet another than the current one
    found = context_of(parent)
    token = contexts.attach(contexts.get_current() if found is None else found)
    try:
        yield
    finally:
        contexts.detach(token)


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """No span is the current one meanwhile: for tasks that are to outlive whoever starts them."""
    token = contexts.attach(trace.set_span_in_context(trace.INVALID_SPAN))
    try:
        yield
    finally:
        contexts.detach(token)


@contextlib.contextmanager
def span(
    operation: Operation,
    attributes: Mapping[str, Attribute] | None = None,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    parent: str | None = None,
) -> Iterator[Span]:
    """``operation`` goes on meanwhile, as a child of the current span, or of the one that ``parent`` names.
    An exception makes the span an error and goes on its way; a cancellation leaves its status unset.
    """
    named = _operation.set(
        str(attributes.get("rpc.method", operation.name)) if attributes else operation.name
    )
    try:
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            # nobody records here, and what is asked of others meanwhile still belongs to the asker's trace
            with trace_context(parent) if parent is not None else contextlib.nullcontext():
                yield trace.INVALID_SPAN
            return
        started = start_span(operation, attributes, kind=kind, parent=parent)
        with trace.use_span(started, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                yield started
            except Exception as exc:
                failed(started, f"{type(exc).__name__}: {exc}")
                raise
    finally:
        _operation.reset(named)


def start_span(
    operation: Operation,
    attributes: Mapping[str, Attribute] | None = None,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    parent: str | None = None,
    links: Sequence[str] = (),
    identity: str | None = None,
) -> Span:
    """A span that its caller ends, and that is not the current one.

    ``links`` are ``traceparent``s; ``identity`` is one with the identifiers that it is to have itself
    (:func:`round_traceparent`, :func:`hop_traceparent`): with ``parent`` both are in one trace.
    """
    token = None
    found = context_of(parent)
    if identity is not None:
        if (named := span_context_of(identity)) is not None:  # it may be made from what a peer sent
            token = _chosen.set((named.trace_id, named.span_id))
        found = contexts.Context() if found is None else found
    try:
        return _tracer().start_span(
            operation.name,
            found,
            kind,
            attributes,
            [Link(one) for text in links if (one := span_context_of(text)) is not None],
        )
    finally:
        if token is not None:
            _chosen.reset(token)


def failed(span: Span, reason: str) -> None:
    """What ``span`` is of has failed. ``reason`` may be a peer's word: it is cut, and made printable."""
    text = reason[:MAX_TEXT].encode("utf-8", "replace").decode()
    span.set_status(Status(StatusCode.ERROR, text))


def _tracer() -> trace.Tracer:
    """That of the provider in force. Making one costs, and changes the process's filters of warnings."""
    global _made
    provider = trace.get_tracer_provider()
    if _made is None or _made[0] is not provider:
        _made = (provider, trace.get_tracer("hypha"))
    return _made[1]


def chosen_identifiers() -> tuple[int, int] | None:
    """(trace, span) that the span which is being started is to have; for the SDK's generator."""
    return _chosen.get()


def event(name: str, attributes: Mapping[str, Attribute] | None = None) -> None:
    """Note in the current span that something happened."""
    trace.get_current_span().add_event(name, attributes)


def span_context_of(text: str) -> trace.SpanContext | None:
    """That of a ``traceparent``; None where it names none."""
    found = trace.get_current_span(context_of(text)).get_span_context()
    return found if found.is_valid else None


# --- identifiers that several processes agree on -------------------------------------------------------


def round_traceparent(job_id: str, generation: int, round_: int, ratio: float) -> str:
    """The ``traceparent`` of the span of a whole round; ``ratio`` of all rounds is sampled."""
    name = f"{job_id}/{generation}/{round_}"
    trace_id, span_id = _digest(name, _TRACE_BYTES), _digest(f"{name}/round", _SPAN_BYTES)
    sampled = ratio > 0 and int.from_bytes(trace_id[_SPAN_BYTES:]) < round(min(1.0, ratio) * (1 << 64))
    return f"00-{trace_id.hex()}-{span_id.hex()}-{'01' if sampled else '00'}"


def hop_traceparent(parent: str, peer: str) -> str:
    """The ``traceparent`` of what ``peer`` did as it passed on a message whose sender's was ``parent``.

    A relayed message is signed, so who passes it on cannot write itself into it; who receives it from there
    knows all the same what the span there is called.
    """
    version, trace_id, span_id, flags = parent.split("-")
    return "-".join((version, trace_id, _digest(f"{span_id}/{peer}", _SPAN_BYTES).hex(), flags))


def _digest(text: str, size: int) -> bytes:
    found = blake2b(text.encode(), digest_size=size).digest()
    # all zero is no identifier
    return found if any(found) else b"\x01" * size
