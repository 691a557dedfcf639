"""libp2p streams, opened and accepted without harm to the connection they run on.

Opening is done by a task of the node: a caller that is cancelled or runs out of time walks away, the task
finishes and throws the stream away. (Cancelling the library half-way leaks streams.)

The library serves each stream that arrives in a task of its own. Here the handlers of all protocols, its own
included, are wrapped: what is over the number that a peer may have served at once is reset before a handler
sees it. Requests are not limited here, as :mod:`hypha.net.rpc` answers those over its limit with ``busy``;
neither are circuits, which the relay counts.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect import Multiselect

from hypha.access import LIBRARY_STREAMS, NOBODY, STREAMS, Allowed, carries, may_act_as, named
from hypha.config.reading.log_filter import TRACE
from hypha.errors import PeerUnreachable
from hypha.naming import shown
from hypha.net.peers.inbound_limits import OverLimit, counted
from hypha.tracing import span
from hypha.tracing.operations import OPEN_STREAM

logger = logging.getLogger(__name__)

#: What a broken stream or connection may raise, from any layer of the library.
STREAM_ERRORS = (BaseLibp2pError, OSError, trio.BrokenResourceError, trio.ClosedResourceError)

#: ``handler(stream, caller)``; the handler closes the stream.
StreamHandler = Callable[[Any, str], Awaitable[None]]
#: Of one protocol, from one peer, over all its connections. Identify and ping need one.
DEFAULT_PER_PEER = 32
#: Where it is another number, by the beginning of the protocol's name, and what it is called when refused.
PER_PEER: tuple[tuple[str, int | None, str], ...] = (
    ("/hypha/rpc/", None, "rpc"),
    ("/libp2p/circuit/relay/", None, "relay"),
    # one that lasts, and others whose end was not noticed here yet
    ("/hypha/report/", 4, "reports"),
    ("/meshsub/", 4, "gossip"),
    ("/floodsub/", 4, "gossip"),
    # as many transfers of one peer may wait for their turn (MAX_ANSWERED_PER_PEER of ``bulk/rendezvous.py``)
    ("/hypha/bulk/", 64, "bulk"),
    # one for each dataset that is announced or looked up at that moment
    ("/ipfs/kad/", 32, "dht"),
)

_Handler = Callable[[Any], Awaitable[None]]


async def discard(stream: Any) -> None:
    """Reset ``stream``, even while being cancelled; never raises."""
    with trio.move_on_after(2.0, shield=True):
        try:
            await stream.reset()
        except Exception as exc:  # noqa: BLE001 - whatever state a peer has brought it into
            logger.debug("A stream could not be reset: %r", exc)


@asynccontextmanager
async def reset_on_error(stream: Any) -> AsyncIterator[None]:
    """Reset ``stream`` where the block raises, or is cancelled."""
    try:
        yield
    except BaseException:
        await discard(stream)
        raise


async def read_exactly(stream: Any, count: int) -> bytes:
    """``count`` bytes; EOFError when the stream ends before."""
    parts = bytearray()
    while len(parts) < count:
        data = await stream.read(count - len(parts))
        if not data:
            raise EOFError(f"the stream ended after {len(parts)} of {count} bytes")
        parts += data
    return bytes(parts)


def contained(serve: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """``serve``, which serves one stream of a peer: an error of it is logged and resets that stream."""

    async def serve_contained(stream: Any) -> None:
        try:
            await serve(stream)
        except Exception as exc:  # noqa: BLE001 - the edge of a peer's stream
            peer = str(stream.muxed_conn.peer_id)
            logger.info("A stream is reset: %r", exc, extra={"peer_id": peer})
            await discard(stream)

    return serve_contained


def roles_behind(stream: Any) -> frozenset[str]:
    """Roles in the certificate with which the peer opened the connection that ``stream`` runs on."""
    roles: frozenset[str] = stream.muxed_conn.secured_conn.roles
    return roles


@dataclass
class _Opening:
    done: trio.Event = field(default_factory=trio.Event)
    stream: Any = None
    error: BaseException | None = None
    abandoned: bool = False


class Streams:
    """Opens streams to peers and serves those that arrive. ``connect`` has a peer connected."""

    def __init__(self, host: Any, nursery: trio.Nursery, connect: Callable[[str], Awaitable[None]]) -> None:
        self._host = host
        self._nursery = nursery
        self._connect = connect
        self._over_limit = OverLimit()

    def say_refused(self, caller: str, what: str, allowed: Allowed, has: frozenset[str]) -> None:
        """That ``what`` was refused to ``caller`` for its role; once of each, as peers may ask for ever."""
        logger.log(
            logging.WARNING if self._over_limit.is_first(caller, what) else logging.DEBUG,
            "Refused %s from %s: it is for a certificate with the role %s, and this one carries %s.",
            what,
            shown(caller),
            named(allowed),
            carries(has),
            extra={"peer_id": caller},
        )

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Call ``handler`` for each stream that a peer opens with ``protocol``, if its roles allow that."""
        use = STREAMS.get(protocol) or LIBRARY_STREAMS.get(protocol)
        allowed = NOBODY if use is None else use.by

        async def serve(stream: Any) -> None:
            caller = str(stream.muxed_conn.peer_id)
            logger.log(TRACE, "A stream for %s arrived.", protocol, extra={"peer_id": caller})
            if not may_act_as(has := roles_behind(stream), allowed):
                self.say_refused(caller, f"a stream of {protocol}", allowed, has)
                await discard(stream)
                return
            try:
                await handler(stream, caller)
            except STREAM_ERRORS as exc:
                logger.debug("A stream of %s broke: %r", protocol, exc, extra={"peer_id": caller})
                await discard(stream)
            except Exception:  # the edge of a service loop: it must not end the connection
                logger.exception("The handler of %s failed.", protocol, extra={"peer_id": caller})
                await discard(stream)

        self._host.set_stream_handler(TProtocol(protocol), serve)

    async def reach(self, peer: str, protocol: str) -> Any:
        """A stream to a peer, connected or not; PeerUnreachable when it cannot be opened."""
        await self._connect(peer)
        try:
            return await self.open(peer, protocol)
        except PeerUnreachable:
            # the connection may have been a dead one; nothing was sent yet, so once more
            await self._connect(peer)
            return await self.open(peer, protocol)

    async def open(self, peer: str, protocol: str) -> Any:
        """A stream to a connected peer; PeerUnreachable when it cannot be opened."""
        with span(OPEN_STREAM, {"hypha.peer": peer, "hypha.protocol": protocol}):
            stream = await self._opened(peer, protocol)
        logger.log(TRACE, "Opened a stream for %s.", protocol, extra={"peer_id": peer})
        return stream

    async def _opened(self, peer: str, protocol: str) -> Any:
        opening = _Opening()
        self._nursery.start_soon(self._open, peer, protocol, opening)
        try:
            await opening.done.wait()
        except trio.Cancelled:
            opening.abandoned = True
            if opening.stream is not None:
                await discard(opening.stream)
            raise
        if opening.error is not None:
            raise PeerUnreachable(peer, f"no stream for {protocol}: {opening.error}") from opening.error
        return opening.stream

    async def _open(self, peer: str, protocol: str, opening: _Opening) -> None:
        try:
            stream = await self._host.new_stream(ID.from_string(peer), [TProtocol(protocol)])
        except Exception as exc:  # noqa: BLE001 - told to whoever waits; the task is the node's
            opening.error = exc
        else:
            if opening.abandoned:
                await discard(stream)
            opening.stream = stream
        finally:
            opening.done.set()


def limit_of(protocol: str) -> tuple[int | None, str]:
    """Streams of one peer that are served at once (None: not limited here), and the name for the metric."""
    for beginning, limit, service in PER_PEER:
        if protocol.startswith(beginning):
            return limit, service
    return DEFAULT_PER_PEER, "other"


class InboundStreams(Multiselect):  # type: ignore[misc]
    """The library's table of handlers by protocol, each of them limited."""

    def __init__(self, others: Multiselect) -> None:
        super().__init__({})
        self._served: Counter[tuple[str, str]] = Counter()
        self._over_limit = OverLimit()
        for protocol, handler in others.handlers.items():
            self.add_handler(protocol, handler)

    def add_handler(self, protocol: Any, handler: Any) -> None:
        limit, service = limit_of(str(protocol))
        limited = handler if handler is None or limit is None else self._limited(handler, limit, service)
        super().add_handler(protocol, limited)

    def _limited(self, handler: _Handler, limit: int, service: str) -> _Handler:
        async def serve(stream: Any) -> None:
            peer = str(stream.muxed_conn.peer_id)
            key = (peer, str(stream.get_protocol()))
            if self._served[key] >= limit:
                self._over_limit.note(peer, service, f"it has {limit} such streams open already")
                await discard(stream)
                return
            with counted(self._served, key):
                await handler(stream)

        return serve
