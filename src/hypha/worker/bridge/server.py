"""The bridge: what one executor can ask of its worker, as JSON over HTTP on a private Unix socket.

The contract is in :mod:`hypha.worker.bridge` and, for machines, in ``/openapi.json``. Errors are ``{error,
detail}`` with a 4xx or 5xx status. A call whose client goes away is cancelled, so it takes nothing it cannot
deliver. The bridge ends when its executor has ended; until then it never blocks the worker, nor fills its
memory: connections, calls under way, streams and what waits in them, bodies and events are bounded, and what
is too much for now is answered 503 ``busy``.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hypha.decoding import decode_json
from hypha.errors import NetworkError, Refused, Undecodable
from hypha.messages import (
    MAX_EVENT_BYTES,
    BridgeError,
    Event,
    ExecutorExited,
    FetchCall,
    FetchedFile,
    Job,
    ReceiveCall,
    Reference,
    SendCall,
    Sent,
    SpansCall,
    StatusCall,
)
from hypha.telemetry.http.hypercorn import BoundedConfig, serve
from hypha.tracing import trace_context
from hypha.worker.bridge.feeds import Directives, Feed, FileArrivals
from hypha.worker.bridge.openapi import openapi
from hypha.worker.bridge.spans import ExecutorSpans

logger = logging.getLogger("hypha.worker.bridge")

MAX_BODY_BYTES = 1 << 20
#: Calls of one executor under way at once, streams left out. Ours make a few: a parameter server one for
#: theta and one for each worker that joins.
MAX_CALLS = 64
#: Streams open at once: one of directives and one for each group of kinds of files, and the same once more
#: while the end of broken ones has not been noticed.
MAX_STREAMS = 16
MAX_CONNECTIONS = MAX_CALLS + 2 * MAX_STREAMS
KEEP_ALIVE_S = 10.0

_STATUS = {
    "invalid": 400,
    "malformed": 400,
    "not-allowed": 403,
    "uninvited": 403,
    "not-found": 404,
    "too-large": 413,
    "busy": 503,
}

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
]

T = TypeVar("T")
StructT = TypeVar("StructT", bound=msgspec.Struct)


class BridgeHandlers(Protocol):
    """Who does what the bridge is asked for. All may raise errors of the tree."""

    arrivals: FileArrivals
    directives: Directives
    spans: ExecutorSpans

    @property
    def job(self) -> Job:
        """With its secrets."""

    async def fetch(self, resource: Reference) -> list[FetchedFile]:
        """See ``/resources/fetch``."""

    async def send(self, call: SendCall) -> Sent:
        """See ``/resources/send``."""

    def report(self, event: Event) -> None:
        """See ``/status/send``; must not block."""


def bind_bridge(socket_path: Path) -> socket.socket:
    """The bridge's socket, for this user alone. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Nobody else gets at the socket before its mode is set: its directory is 0700.
        listener.bind(str(socket_path))
        socket_path.chmod(0o600)
    except BaseException:
        listener.close()
        raise
    return listener


async def serve_bridge(
    handlers: BridgeHandlers,
    listener: socket.socket,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve on ``listener``, which this closes, until cancelled. End the executor first: what it does
    not read could otherwise hold up the end.
    """
    config = BoundedConfig()
    config.max_connections = MAX_CONNECTIONS
    # an executor may be stopped, or busy with its training: it reads on when it can
    config.write_timeout_s = math.inf
    config.bind = [f"fd://{listener.detach()}"]
    config.accesslog = None
    config.errorlog = logging.getLogger("hypha.worker.bridge.http")
    config.errorlog.setLevel(logging.WARNING)
    config.include_server_header = False
    config.keep_alive_timeout = 24 * 3600.0  # clients keep connections in pools; they are few
    config.graceful_timeout = 0.5
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, make_app(handlers), config)
        task_status.started()


def make_app(handlers: BridgeHandlers) -> Starlette:
    calls, streams = trio.CapacityLimiter(MAX_CALLS), trio.CapacityLimiter(MAX_STREAMS)

    async def get_job(_: bytes) -> Response:
        return _json(handlers.job)

    async def get_openapi(_: bytes) -> Response:
        return _json(openapi())

    async def fetch(body: bytes) -> Response:
        return _json(await handlers.fetch(_decode(body, FetchCall).resource))

    async def send(body: bytes) -> Response:
        return _json(await handlers.send(_decode(body, SendCall)))

    async def receive(body: bytes) -> ASGIApp:
        kinds = frozenset(_decode(body, ReceiveCall).kinds)
        return _event_stream(lambda: handlers.arrivals.open(kinds), streams)

    async def directives(_: bytes) -> ASGIApp:
        return _event_stream(handlers.directives.open, streams)

    async def report(body: bytes) -> Response:
        if len(body) > MAX_EVENT_BYTES:
            raise Refused("too-large", f"an event has at most {MAX_EVENT_BYTES} bytes")
        event = _decode(body, StatusCall).event
        if isinstance(event, ExecutorExited):
            raise Refused("invalid", "that an executor ended is reported by its worker")
        handlers.report(event)
        return _json({})

    async def take_spans(body: bytes) -> Response:
        handlers.spans.take(_decode(body, SpansCall).spans)
        return _json({})

    def route(path: str, method: str, call: Callable[[bytes], Awaitable[ASGIApp]]) -> Route:
        async def endpoint(request: Request) -> ASGIApp:
            try:
                calls.acquire_on_behalf_of_nowait(request)
            except trio.WouldBlock:
                return _busy(f"{MAX_CALLS} calls are under way")
            try:
                return await _answer(request, call)
            finally:
                calls.release_on_behalf_of(request)

        return Route(path, endpoint, methods=[method])

    return Starlette(
        routes=[
            route("/openapi.json", "GET", get_openapi),
            route("/job", "GET", get_job),
            route("/directives", "GET", directives),
            route("/resources/fetch", "POST", fetch),
            route("/resources/send", "POST", send),
            route("/resources/receive", "POST", receive),
            route("/status/send", "POST", report),
            route("/spans", "POST", take_spans),
        ],
        exception_handlers={404: _no_such_path, 405: _no_such_path},
    )


async def _answer(request: Request, call: Callable[[bytes], Awaitable[ASGIApp]]) -> ASGIApp:
    try:
        body = await _read_body(request)
        # what the worker does for this call is below the executor's own span
        with trace_context(request.headers.get("traceparent")):
            return await _unless_gone(request, call, body)
    except Refused as exc:
        status = 409 if exc.peer else _STATUS.get(exc.code, 409)
        return _error(status, exc.code, exc.reason if not exc.peer else str(exc))
    except NetworkError as exc:
        return _error(502, "unreachable", str(exc))
    except Exception as exc:  # the edge of this service: whatever it is, the executor is told
        logger.exception("A call of the bridge failed: %s %s", request.method, request.url.path)
        return _error(500, "internal", f"{type(exc).__name__}: {exc}")


async def _read_body(request: Request) -> bytes:
    # Not request.stream(): an async generator that is left in the middle warns when it is collected.
    body = bytearray()
    while True:
        message = await request.receive()
        part: bytes = message.get("body", b"")
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise Refused("too-large", f"a call has at most {MAX_BODY_BYTES} bytes")
        if not message.get("more_body", False):
            return bytes(body)


async def _unless_gone(request: Request, call: Callable[[bytes], Awaitable[ASGIApp]], body: bytes) -> ASGIApp:
    """The call's response; the call is cancelled when the client closes its connection."""
    response: ASGIApp | None = None
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_when_gone, request.receive, nursery.cancel_scope)
        try:
            response = await call(body)
        except Exception as exc:  # noqa: BLE001 - carried out of the nursery, which would wrap it in a group
            failure = exc
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return response if response is not None else Response(status_code=499)


async def _cancel_when_gone(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _no_such_path(request: Request, exc: Exception) -> Response:
    status = getattr(exc, "status_code", 404)
    return _error(status, "unsupported", f"no {request.method} {request.url.path}; see /openapi.json")


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return decode_json(body, kind)
    except Undecodable as exc:
        raise Refused("malformed", f"the call is no {kind.__name__}: {exc}") from exc


def _busy(why: str) -> Response:
    return _error(503, "busy", f"{why}; try again")


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _error(status: int, error: str, detail: str) -> Response:
    return _json(BridgeError(error=error, detail=detail), status)


def _event_stream(
    open_feed: Callable[[], AbstractContextManager[Feed[StructT]]], places: trio.CapacityLimiter
) -> ASGIApp:
    """Server-sent events: one JSON document each, with the struct's tag or name as ``event``.

    Not an async generator: those may not be left suspended when their task is cancelled.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def write(text: bytes) -> None:
            await send({"type": "http.response.body", "body": text, "more_body": True})

        try:
            places.acquire_on_behalf_of_nowait(answer)
        except trio.WouldBlock:
            await _busy(f"{MAX_STREAMS} streams are open")(scope, receive, send)
            return
        try:
            with open_feed() as feed:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_when_gone, receive, nursery.cancel_scope)
                    await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                    await write(b": open\n\n")
                    # until the client reads so slowly that too much waits: it opens another stream then
                    with suppress(trio.EndOfChannel):
                        while True:
                            text = b": keep-alive\n\n"
                            with trio.move_on_after(KEEP_ALIVE_S):
                                text = _event(await feed.get())
                            await write(text)
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                    nursery.cancel_scope.cancel()
        finally:
            places.release_on_behalf_of(answer)

    return answer


def _event(value: msgspec.Struct) -> bytes:
    name = value.__struct_config__.tag or "file"
    return b"event: " + str(name).encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"
