"""Requests and answers: ``/hypha/rpc/1``, one fresh stream a request.

A frame is four bytes of big-endian length and a MessagePack envelope. Every request gets an answer, a
refusal included; over the concurrency limit the answer is ``busy``. Each peer has a few places that no other
can take, and partners (who share a lease with this node) have all of theirs: so nobody's flood makes a
renewal ``busy``. A caller that is cancelled or runs out of time leaves at once: the stream is ended by a task
of the node, the connection is not touched.
"""

from __future__ import annotations

import logging
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio
from libp2p.network.stream.exceptions import StreamEOF
from opentelemetry.trace import SpanKind

from hypha.access import REQUESTS, Allowed, carries, may_act_as, named
from hypha.config.tuning import ConnectionTuning
from hypha.decoding import decode
from hypha.errors import REFUSALS, NetworkError, PeerUnreachable, Refused, RequestTimeout, Undecodable
from hypha.messages import (
    MAX_REQUEST_BYTES,
    MAX_RESPONSE_BYTES,
    WIRE_VERSION,
    RefusedReply,
    Request,
    RequestEnvelope,
    Response,
    ResponseEnvelope,
)
from hypha.naming import cleaned
from hypha.net.libp2p.streams import (
    STREAM_ERRORS,
    Streams,
    discard,
    read_exactly,
    reset_on_error,
    roles_behind,
)
from hypha.net.peers.inbound_limits import OverLimit, counted
from hypha.telemetry.instruments import ANSWER_DURATION, REQUEST_DURATION
from hypha.tracing import span, traceparent
from hypha.tracing.operations import ANSWER, REQUEST

logger = logging.getLogger(__name__)

PROTOCOL = "/hypha/rpc/1"
#: Of a peer's requests at once so many have places of its own. The others are taken from those that all peers
#: share: when a few peers use all of them, the rest have their own.
OWN_PER_PEER = 2
#: A caller must have sent its request within this, and taken the answer within this.
READ_TIMEOUT_S = 30.0
WRITE_TIMEOUT_S = 60.0
#: Requests of all peers together that are served have so many bytes at most; a small one has its place in any
#: case, and a partner's.
MAX_HELD_BYTES = 64 << 20
SMALL_BYTES = 16 << 10
#: A refusal's reason goes into logs and records.
MAX_REASON_LENGTH = 4096
#: What is not to be answered is read, and dropped, in pieces of this size.
_DROP_BYTES = 64 << 10

Handler = Callable[[str, Any], Awaitable[Response]]

_LENGTH = struct.Struct(">I")
_requests = msgspec.msgpack.Decoder(RequestEnvelope)
_responses = msgspec.msgpack.Decoder(ResponseEnvelope)


class Oversized(Exception):
    """A frame over its limit."""


async def read_frame(stream: Any, limit: int) -> bytes:
    """One frame; Oversized when it says that it is over ``limit``, EOFError when the stream ends."""
    return await read_exactly(stream, await _read_length(stream, limit))


async def _read_length(stream: Any, limit: int) -> int:
    (size,) = _LENGTH.unpack(await read_exactly(stream, _LENGTH.size))
    if size > limit:
        raise Oversized(f"{size} bytes, over the limit of {limit}")
    return int(size)


async def _drop(stream: Any, size: int) -> None:
    while size:
        data = await stream.read(min(size, _DROP_BYTES))
        if not data:
            raise EOFError(f"the stream ended {size} bytes before its frame")
        size -= len(data)


def frame(payload: bytes) -> bytes:
    """``payload`` with its length before it."""
    return _LENGTH.pack(len(payload)) + payload


@dataclass
class _Call:
    """A request under way; ``scope`` ends it when the caller left."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)
    response: Response | None = None
    error: NetworkError | None = None


class Rpc:
    """Asks, and answers with the handlers given to :meth:`answer`."""

    def __init__(self, streams: Streams, nursery: trio.Nursery, limits: ConnectionTuning) -> None:
        self._limits = limits
        self._streams = streams
        self._nursery = nursery
        self._handlers: dict[type, tuple[Handler, Allowed]] = {}
        self._inbound: Counter[str] = Counter()
        self._shared = 0
        self._held_bytes = 0
        self._over_limit = OverLimit()
        #: who shares a lease with this node, and has all of its places
        self.is_partner: Callable[[str], bool] = lambda peer: False
        streams.handle(PROTOCOL, self._serve)

    async def request(self, peer: str, request: Request, timeout_s: float) -> Response:
        """The answer of ``peer``. Raises Refused, PeerUnreachable or RequestTimeout."""
        name, began, status = type(request).__name__, trio.current_time(), "cancelled"
        with span(REQUEST, _attributes(name, peer), kind=SpanKind.CLIENT) as asked:
            try:
                response = await self._request(peer, request, timeout_s)
                status = "success"
                return response
            except NetworkError as exc:
                status = _status(exc)
                asked.set_attribute("error.type", status)
                raise
            finally:
                took_s = trio.current_time() - began
                REQUEST_DURATION.record(took_s, type=name, status=status)
                logger.debug("Request %s: %s after %.3f s.", name, status, took_s, extra={"peer_id": peer})

    async def _request(self, peer: str, request: Request, timeout_s: float) -> Response:
        payload = msgspec.msgpack.encode(RequestEnvelope(body=request, traceparent=traceparent()))
        if len(payload) > MAX_REQUEST_BYTES:
            raise Refused(
                "too-large", f"the request has {len(payload)} bytes, over the limit of {MAX_REQUEST_BYTES}"
            )
        call = _Call()
        self._nursery.start_soon(self._ask, peer, payload, call)
        try:
            with trio.move_on_after(timeout_s):
                await call.done.wait()
        finally:
            call.scope.cancel()
        if call.error is not None:
            raise call.error
        if call.response is None:
            raise RequestTimeout(peer, type(request).__name__, timeout_s)
        if isinstance(call.response, RefusedReply):
            said = call.response
            raise Refused(cleaned(said.code), said.reason[:MAX_REASON_LENGTH], peer)
        return call.response

    async def _ask(self, peer: str, payload: bytes, call: _Call) -> None:
        with call.scope:
            try:
                call.response = await self._exchange(peer, payload)
            except NetworkError as exc:
                call.error = exc
            except Exception as exc:  # the edge of a task of the node: one odd answer must not end it
                logger.exception("A request to %s failed.", peer, extra={"peer_id": peer})
                call.error = PeerUnreachable(peer, f"the request failed here ({exc!r})")
        call.done.set()

    async def _exchange(self, peer: str, payload: bytes) -> Response:
        stream = await self._streams.reach(peer, PROTOCOL)
        try:
            async with reset_on_error(stream):
                await stream.write(frame(payload))
                answer = await read_frame(stream, MAX_RESPONSE_BYTES)
                await stream.close()
        except Oversized as exc:
            raise Refused("too-large", f"its answer has {exc}", peer) from exc
        except (*STREAM_ERRORS, EOFError) as exc:
            raise PeerUnreachable(peer, f"the connection broke before the answer ({exc!r})") from exc
        try:
            envelope = decode(_responses.decode, answer)
        except Undecodable as exc:
            raise Refused("malformed", f"its answer does not decode: {exc}", peer) from exc
        if envelope.v != WIRE_VERSION:
            raise Refused("malformed", f"its answer has version {envelope.v}", peer)
        return envelope.body

    def answer(self, kind: type[Any], handler: Handler) -> None:
        self._handlers[kind] = (handler, REQUESTS[kind].by)

    @contextmanager
    def _place(self, caller: str) -> Iterator[bool]:
        """A place among the requests that are served; False: there is none."""
        mine = self._inbound[caller]
        shares = mine >= OWN_PER_PEER and not self.is_partner(caller)
        if mine >= self._limits.requests_per_peer or (shares and self._shared >= self._limits.requests):
            self._over_limit.note(caller, "rpc", "there are too many requests at once")
            yield False
            return
        self._shared += shares
        try:
            with counted(self._inbound, caller):
                yield True
        finally:
            self._shared -= shares

    async def _serve(self, stream: Any, caller: str) -> None:
        with self._place(caller) as has_place:
            await self._serve_one(stream, caller, not has_place)

    def _may_hold(self, caller: str, size: int) -> bool:
        """Whether a request of ``size`` bytes may be kept while it is served."""
        if size <= SMALL_BYTES or self._held_bytes + size <= MAX_HELD_BYTES or self.is_partner(caller):
            return True
        self._over_limit.note(caller, "rpc", "the requests of all peers have too many bytes together")
        return False

    async def _serve_one(self, stream: Any, caller: str, busy: bool) -> None:
        held, payload = 0, b""
        answer: Response | None = None
        try:
            with trio.fail_after(READ_TIMEOUT_S):
                try:
                    size = await _read_length(stream, MAX_REQUEST_BYTES)
                except Oversized as exc:
                    answer = RefusedReply(code="too-large", reason=f"the request has {exc}")
                else:
                    if busy or not self._may_hold(caller, size):
                        # to the end, or the answer would be lost in a reset; how many it may open is bounded
                        await _drop(stream, size)
                        answer = RefusedReply(
                            code="busy", reason="too many requests at once; try again later"
                        )
                    else:
                        self._held_bytes += size
                        held = size
                        payload = await read_exactly(stream, size)
            if answer is None:
                async with trio.open_nursery() as nursery:
                    # whoever gave up has reset the stream: nobody waits for the answer, and its place
                    # among the requests being served is needed by others
                    nursery.start_soon(_until_reset, stream, nursery.cancel_scope)
                    answer = await self._answer(caller, roles_behind(stream), payload)
                    nursery.cancel_scope.cancel()
            if answer is None:
                await discard(stream)
                return
            with trio.fail_after(WRITE_TIMEOUT_S):
                await self._reply(stream, answer)
        except (*STREAM_ERRORS, EOFError, trio.TooSlowError) as exc:
            logger.debug("A request broke off: %r", exc, extra={"peer_id": caller})
            await discard(stream)
        finally:
            self._held_bytes -= held

    async def _reply(self, stream: Any, reply: Response) -> None:
        encoded = msgspec.msgpack.encode(ResponseEnvelope(body=reply))
        if len(encoded) > MAX_RESPONSE_BYTES:
            too_large = RefusedReply(code="too-large", reason=f"the answer would have {len(encoded)} bytes")
            encoded = msgspec.msgpack.encode(ResponseEnvelope(body=too_large))
        await stream.write(frame(encoded))
        await stream.close()

    async def _answer(self, caller: str, has: frozenset[str], payload: bytes) -> Response:
        try:
            envelope = decode(_requests.decode, payload)
        except Undecodable as exc:
            return RefusedReply(code="malformed", reason=f"the request does not decode: {exc}")
        if envelope.v != WIRE_VERSION:
            reason = f"the request has version {envelope.v}, this node speaks {WIRE_VERSION}"
            return RefusedReply(code="malformed", reason=reason)
        name, began = type(envelope.body).__name__, trio.current_time()
        attributes = _attributes(name, caller)
        with span(ANSWER, attributes, kind=SpanKind.SERVER, parent=envelope.traceparent) as answered:
            reply = await self._handle(caller, has, envelope.body, name)
            status = "success"
            if isinstance(reply, RefusedReply):
                status = reply.code
                answered.set_attribute("error.type", status)
            took_s = trio.current_time() - began
            ANSWER_DURATION.record(took_s, type=name, status=status)
            logger.debug("Answered %s: %s after %.3f s.", name, status, took_s, extra={"peer_id": caller})
        return reply

    async def _handle(self, caller: str, has: frozenset[str], request: Request, name: str) -> Response:
        handler, roles = self._handlers.get(type(request), (None, None))
        if handler is None:
            return RefusedReply(code="unsupported", reason=f"this component does not answer {name}")
        if not may_act_as(has, roles):
            reason = f"{name} needs a certificate with the role {named(roles)}; yours carries {carries(has)}"
            return RefusedReply(code="role", reason=reason)
        try:
            return await handler(caller, request)
        except Refused as exc:
            return RefusedReply(code=exc.code, reason=exc.reason)
        except Exception:  # the edge of the service: one bad request must not end the node
            logger.exception("The handler of %s failed.", name, extra={"peer_id": caller})
            return RefusedReply(code="internal", reason=f"{name} failed there; its log says more")


def _attributes(name: str, peer: str) -> dict[str, str]:
    return {"rpc.system": "hypha", "rpc.method": name, "hypha.peer": peer}


def _status(exc: NetworkError) -> str:
    """How a request ended: with a refusal's code, or without an answer."""
    if isinstance(exc, Refused):
        # a label of a metric, of which each new value takes memory for good: not whatever a peer writes
        return exc.code if exc.code in REFUSALS else "other"
    return "timeout" if isinstance(exc, RequestTimeout) else "unreachable"


async def _until_reset(stream: Any, scope: trio.CancelScope) -> None:
    """Cancel ``scope`` when the caller resets ``stream``, not when it only has no more to say."""
    try:
        await stream.read(1)
    except StreamEOF:
        # the library says this of a reset too, when that came while the reader waited
        if stream.muxed_stream.reset_received:
            scope.cancel()
    except STREAM_ERRORS:
        scope.cancel()
