"""One listening port for both planes, so that a firewall needs one rule.

The first byte of a connection says what it is: 0x13 opens multistream (libp2p), 0x16 a TLS ClientHello (the
bulk plane, handed on as a blocking socket in a thread). Anything else, and silence, is closed. The number of
connections being looked at or served is bounded, because the bulk plane passes by libp2p's own limit, and
those without a verified certificate have places of their own (:mod:`hypha.net.peers.inbound_limits`).
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP, TCPListener
from libp2p.utils.multiaddr_utils import multiaddr_from_socket
from multiaddr import Multiaddr

from hypha.config.tuning import TuningConfig
from hypha.net.peers.addresses import host_and_port, parse
from hypha.net.peers.inbound_limits import InboundConnection, InboundConnections
from hypha.net.sockets import ByteCounts, resend_soon, set_buffers
from hypha.telemetry.instruments import CONNECTIONS_FAILED

logger = logging.getLogger(__name__)

FIRST_BYTE_TIMEOUT_S = 5.0
#: Connections of one address that fail in the same way are logged once within this.
TELL_AGAIN_S = 60.0
MULTISTREAM = b"\x13"
TLS_CLIENT_HELLO = b"\x16"

#: Serves one bulk connection; owns the (blocking) socket from then on. Runs in a thread.
ServeSocket = Callable[[socket.socket], None]


class WatchedStream(TrioTCPStream):  # type: ignore[misc]
    """A TCP stream that tells when it was closed, and is among ``registry`` until then. Its bytes are
    counted, here and nowhere above, where those of a circuit would count once more. ``arrival`` is the place
    of one that was dialled from outside.
    """

    _cached_remote_address: tuple[str, int] | None

    def __init__(
        self,
        stream: trio.SocketStream,
        registry: set[WatchedStream],
        counts: ByteCounts,
        arrival: InboundConnection | None = None,
    ) -> None:
        super().__init__(stream)
        self.arrival = arrival
        resend_soon(stream.socket)
        self.closed = trio.Event()
        self._registry = registry
        self._counts = counts
        registry.add(self)

    def get_remote_address(self) -> tuple[str, int] | None:
        """Also of IPv6, whose socket addresses have four parts: the library knows those with two only."""
        if self._cached_remote_address is None:
            with contextlib.suppress(OSError):
                host, port, *_ = self.stream.socket.getpeername()
                # a multiaddress has no place for the interface of a link-local one
                self._cached_remote_address = (str(host).partition("%")[0], int(port))
        return self._cached_remote_address

    async def write(self, data: bytes) -> None:
        await super().write(data)
        self._counts.add(sent=len(data))

    async def read(self, n: int | None = None) -> bytes:
        data: bytes = await super().read(n)
        self._counts.add(received=len(data))
        return data

    async def close(self) -> None:
        self.closed.set()
        self._registry.discard(self)
        await super().close()


class _OwnPortListener(TCPListener):  # type: ignore[misc]
    """A listener that has its port for itself. The library's own sets SO_REUSEPORT, for hole punching, with
    which a second node on the same port starts happily and takes half of the connections. ``port`` is told
    why it cannot listen: the library says only that it could not.
    """

    def __init__(self, handler: Callable[[trio.SocketStream], Awaitable[None]], port: SharedPortTcp) -> None:
        super().__init__(handler)
        self._port = port

    async def listen(self, maddr: Multiaddr) -> None:
        address = parse(str(maddr))
        host, port = host_and_port(address.transport)
        try:
            opened = await trio.open_tcp_listeners(port, host=host)
            for listener in opened:
                set_buffers(listener.socket, self._port.sockets)  # what it accepts has the same
        except OSError as exc:
            self._port.listening_failed = exc
            raise OpenConnectionError(f"cannot listen on {maddr}: {exc}") from exc
        async with self._lifecycle_lock:
            if self._nursery is None:
                await self._spawn_background_task()
            await self._nursery.start(trio.serve_listeners, self.handler, opened)
            self.listeners.extend(opened)

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        """Of the sockets that are open: a peer may still ask while the node is being closed."""
        sockets = [listener.socket for listener in self.listeners]
        return tuple(multiaddr_from_socket(sock) for sock in sockets if sock.fileno() >= 0)


class SharedPortTcp(TCP):  # type: ignore[misc]
    """The TCP transport of both planes. ``serve_bulk`` may be set later; until then bulk is refused."""

    def __init__(self, max_connections: int, tuning: TuningConfig) -> None:
        limits = tuning.connections
        super().__init__()
        self.sockets = tuning.sockets
        self.serve_bulk: ServeSocket | None = None
        #: why it could not listen the last time
        self.listening_failed: OSError | None = None
        self.arrivals = InboundConnections(max_connections, limits)
        # in these threads peers prove who they are and say what their bulk connection is for: twice as many
        # as one address may have of them. Transfers queue for their own, smaller limit behind it
        self._threads = trio.CapacityLimiter(2 * limits.unproven_per_address)
        self._streams: set[WatchedStream] = set()
        self._counts = ByteCounts("control")

    async def dial(self, maddr: Multiaddr) -> RawConnection:
        raw = await super().dial(maddr)
        set_buffers(raw.stream.stream.socket, self.sockets)
        raw.stream = WatchedStream(raw.stream.stream, self._streams, self._counts)
        return raw

    async def sever(self) -> None:
        """Close every connection that is still open: the library forgets some when it is cancelled."""
        for stream in list(self._streams):
            await trio.aclose_forcefully(stream.stream)
        self._counts.hand_over()

    def create_listener(self, handler_function: Callable[[Any], Awaitable[None]]) -> TCPListener:
        async def accept(stream: trio.SocketStream) -> None:
            try:
                await self._accept(stream, handler_function)
            except Exception:  # the edge of a connection: the listener is there for the others
                logger.exception("An incoming connection failed.")

        return _OwnPortListener(accept, self)

    async def _accept(self, stream: trio.SocketStream, serve: Callable[[Any], Awaitable[None]]) -> None:
        """Serve a connection, by ``serve`` where it is for libp2p; the listener closes what is left."""
        try:
            host = str(stream.socket.getpeername()[0])
        except OSError:
            return  # who dialled has gone already
        with trio.CancelScope() as scope:
            arrival = self.arrivals.arrive(host, scope.cancel)
            if arrival is None:
                self._note_refused(host, "others that have shown no certificate yet have all places")
                return
            try:
                await self._dispatch(stream, arrival, serve)
            finally:
                self.arrivals.leave(arrival)
        if scope.cancelled_caught:
            late = "" if arrival is not None and arrival.peer else "it took too long, and "
            self._note_refused(host, f"{late}its place was needed")

    def _note_refused(self, host: str, why: str) -> None:
        CONNECTIONS_FAILED.add(direction="inbound", reason="limit")
        if self.arrivals.over_limit.is_first(host, "connection"):
            logger.warning(
                "Closed an incoming connection from %s: %s. This is logged once an address.", host, why
            )

    async def _dispatch(
        self, stream: trio.SocketStream, arrival: InboundConnection, serve: Callable[[Any], Awaitable[None]]
    ) -> None:
        connection = stream.socket
        first = b""
        with trio.move_on_after(FIRST_BYTE_TIMEOUT_S):
            try:
                first = await connection.recv(1, socket.MSG_PEEK)
            except OSError:
                return
        if first == MULTISTREAM:
            logger.debug("A connection for libp2p arrived.")
            await self._serve_libp2p(stream, arrival, serve)
        elif first == TLS_CLIENT_HELLO and self.serve_bulk is not None:
            logger.debug("A connection for the bulk plane arrived.")
            arrival.cut = None  # its thread would go on: it has a deadline of its own
            await self._serve_bulk(connection, self.serve_bulk)
        else:
            is_first = self.arrivals.over_limit.is_first(arrival.source, "protocol", TELL_AGAIN_S)
            logger.log(
                logging.INFO if is_first else logging.DEBUG,
                "Closed an incoming connection that spoke neither protocol.",
            )

    async def _serve_libp2p(
        self, stream: trio.SocketStream, arrival: InboundConnection, serve: Callable[[Any], Awaitable[None]]
    ) -> None:
        # The library's handler waits for the end of the whole swarm and keeps one of its inbound slots
        # until then: a long-lived gateway would run out of them. It is ended with its connection.
        watched = WatchedStream(stream, self._streams, self._counts, arrival)
        async with trio.open_nursery() as nursery:

            async def serve_watched() -> None:
                await serve(watched)
                nursery.cancel_scope.cancel()

            nursery.start_soon(serve_watched)
            try:
                await watched.closed.wait()
            finally:
                self._streams.discard(watched)  # the listener closes it
            nursery.cancel_scope.cancel()

    async def _serve_bulk(self, connection: trio.socket.SocketType, serve: ServeSocket) -> None:
        async with self._threads:
            blocking = socket.socket(fileno=connection.detach())
            blocking.setblocking(True)
            started = trio.CapacityLimiter(1)  # taken from the moment when the thread is on its way
            try:
                # the thread owns the socket; ``BulkTransfers`` shuts it to end the thread at shutdown
                await trio.to_thread.run_sync(serve, blocking, limiter=started, abandon_on_cancel=True)
            finally:
                if not started.borrowed_tokens:
                    blocking.close()


def arrival_of(raw: Any) -> InboundConnection | None:
    """None of what was dialled here, and of circuits, which are counted by their relays."""
    stream = getattr(raw, "stream", None)
    return stream.arrival if isinstance(stream, WatchedStream) else None
