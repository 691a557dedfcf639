"""How the two ends of a transfer find each other: connections are made, proven and matched by token.

Either end expects a token from one certain peer. A connection with that token from anybody else is
refused, whoever stole it: what counts is the certificate. One on which a file is asked for needs no token:
what it asks for is judged by the certificate. Direct connections are dialled and accepted
here in threads with short time-outs; :meth:`Rendezvous.close` ends them all.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import trio

from hypha.config.tuning import SocketTuning
from hypha.errors import IdentityError, NetworkError
from hypha.net.bulk.connections import (
    BulkConnection,
    SocketConnection,
    StreamConnection,
    TransferredBytes,
    in_thread,
    is_trusted,
)
from hypha.net.bulk.wire import (
    BULK_ALPN,
    BULK_PROTOCOL,
    HANDSHAKE_TIMEOUT_S,
    WANT_PROTOCOL,
    BulkConnections,
    ConnectionBroken,
    Hello,
    Verdict,
    WantFile,
    encode_frame,
)
from hypha.net.peers.inbound_limits import REMEMBERED, Recent
from hypha.net.sockets import resend_soon, set_buffers
from hypha.pki.certificates import presented_chain

logger = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 3.0
#: Addresses of one peer that are tried.
MAX_TARGETS = 4

_NOT_EXPECTED = Verdict("refused", "not-found", "this transfer is not expected here, or no longer")


class Expected:
    """Where the connection of one transfer arrives; a newer one replaces one that nobody took yet."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self._arrived = trio.Event()
        self._link: BulkConnection | None = None
        self._closed = False

    def arrive(self, link: BulkConnection) -> bool:
        """Hand a connection over; False when nobody wants it any more."""
        if self._closed:
            return False
        if self._link is not None:
            self._link.close_now()
        self._link = link
        self._arrived.set()
        return True

    async def take(self) -> BulkConnection:
        """The next connection; it is the caller's to close."""
        while self._link is None:
            self._arrived = trio.Event()
            await self._arrived.wait()
        link, self._link = self._link, None
        return link

    def close(self) -> None:
        self._closed = True
        if self._link is not None:
            self._link.close_now()
            self._link = None


class Rendezvous:
    """Makes connections and hands them over; ``serve`` answers a want on a new one, and closes it."""

    serve: Callable[[BulkConnection, WantFile], Awaitable[None]]

    def __init__(
        self,
        links: BulkConnections,
        tally: TransferredBytes,
        limiter: trio.CapacityLimiter,
        sockets: SocketTuning,
    ) -> None:
        self._links = links
        self._sockets = sockets
        self._tally = tally
        self._limiter = limiter
        self._expected: dict[str, Expected] = {}
        self._lock = threading.Lock()
        self._open_sockets: set[socket.socket] = set()
        #: those that somebody has, as long as he has them
        self._proven: WeakSet[SocketConnection] = WeakSet()
        self._loop: trio.lowlevel.TrioToken | None = None
        #: per peer, the address at which it was last reached
        self._reached: Recent[str, tuple[str, int]] = Recent(REMEMBERED)
        self._nursery: trio.Nursery | None = None
        links.set_stream_handler(BULK_PROTOCOL, partial(self._serve_stream, kind=Hello))
        links.set_stream_handler(WANT_PROTOCOL, partial(self._serve_stream, kind=WantFile))

    def start(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._loop = trio.lowlevel.current_trio_token()

    def close(self) -> None:
        """End all connections that nobody has taken, and the threads that work on them."""
        with self._lock:
            self._loop = self._nursery = None
            sockets = list(self._open_sockets)
        for sock in sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for expected in list(self._expected.values()):
            expected.close()

    async def cut_untrusted(self) -> None:
        """End connections, also busy ones, whose other end has a certificate that is not trusted any more."""
        for link in list(self._proven):
            if not is_trusted(link, self._links.identity):
                link.cut()
            await trio.lowlevel.checkpoint()

    def _arrived(self, first: Hello | WantFile, link: SocketConnection) -> None:
        self._proven.add(link)
        if isinstance(first, Hello):
            if not self._hand_over(first.token, link):
                link.refuse_now(_NOT_EXPECTED)
        elif self._nursery is None:
            link.close_now()
        else:
            try:
                self._nursery.start_soon(self.serve, link, first)
            except RuntimeError:  # this node is closing
                link.close_now()

    @contextmanager
    def expect(self, token: str, expected: Expected) -> Iterator[Expected]:
        """Take connections for ``token`` while inside."""
        self._expected[token] = expected
        try:
            yield expected
        finally:
            expected.close()
            if self._expected.get(token) is expected:
                del self._expected[token]

    def is_expected(self, token: str, peer: str) -> bool:
        """Whether a connection of that peer for that token would be taken."""
        expected = self._expected.get(token)
        return expected is not None and expected.peer == peer

    def serve_socket(self, sock: socket.socket) -> None:
        """Take over an accepted blocking connection (a thread's main function); returns soon: at the
        latest after ``HANDSHAKE_TIMEOUT_S``, the first message included and however it is dealt out, at once
        after :meth:`close`. Never raises.
        """
        tls: ssl.SSLSocket | None = None
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            resend_soon(sock)
            context = self._links.identity.server_context(BULK_ALPN)
            sock.settimeout(HANDSHAKE_TIMEOUT_S)
            tls = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            with self._tracked(tls) as loop:
                tls.do_handshake()
                peer = self._prove(tls)
                link = SocketConnection(tls, peer, self._tally, self._limiter)
                link.way = "direct"
                first = link.read_first(deadline)
                loop.run_sync_soon(self._arrived, first, link)
                tls = None
        except (OSError, ValueError, IdentityError, ConnectionBroken, trio.RunFinishedError) as exc:
            logger.info("Refused an incoming bulk connection: %s", exc)
        except Exception:  # the edge of a thread that serves a stranger
            logger.exception("An incoming bulk connection failed.")
        finally:
            with contextlib.suppress(OSError):
                (tls if tls is not None else sock).close()

    def _hand_over(self, token: str, link: BulkConnection) -> bool:
        """False when nobody waits for it."""
        if self.is_expected(token, link.peer) and self._expected[token].arrive(link):
            return True
        if token in self._expected:
            logger.warning(
                "A peer came with the transfer token of another one and was refused.",
                extra={"peer_id": link.peer},
            )
        else:
            logger.info("A bulk connection came for a transfer that is over.", extra={"peer_id": link.peer})
        return False

    async def _serve_stream(self, stream: Any, caller: str, kind: type[Hello | WantFile]) -> None:
        link = StreamConnection(stream, caller, self._tally, self._limiter)
        link.way, link.knows_want = "stream", kind is WantFile
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_S):
                first = await link.hear()
            if not isinstance(first, kind):
                raise ConnectionBroken("the peer did not say what its stream is for")
            if isinstance(first, WantFile):
                await self.serve(link, first)
            elif self._hand_over(first.token, link):
                await link.closed.wait()
            else:
                await link.say(_NOT_EXPECTED)
        except (ConnectionBroken, trio.TooSlowError) as exc:
            logger.info("Refused an incoming bulk stream: %s", exc, extra={"peer_id": caller})
        finally:
            await link.close()

    async def dial(self, peer: str, offered: tuple[str, ...], token: str | None) -> BulkConnection:
        """A direct connection to ``peer``, greeted with ``token``; without one the caller is to say at once
        what it wants. ConnectionBroken says what was tried.
        """
        targets = self._links.bulk_targets(peer, offered)[:MAX_TARGETS]
        if (last := self._reached.get(peer)) in targets:
            targets.remove(last)
            targets.insert(0, last)
        problems = []
        for host, port in targets:
            try:
                link = await self._dial_one(peer, host, port, token)
            except (OSError, ValueError, ConnectionBroken, IdentityError) as exc:
                problems.append(f"{host}:{port}: {exc}")
            else:
                self._reached[peer] = (host, port)
                return link
        raise ConnectionBroken("; ".join(problems) or "no direct address of it is known")

    async def _dial_one(self, peer: str, host: str, port: int, token: str | None) -> BulkConnection:
        with trio.move_on_after(DIAL_TIMEOUT_S) as scope:
            stream = await trio.open_tcp_stream(host, port)
        if scope.cancelled_caught:
            raise ConnectionBroken(f"no answer within {DIAL_TIMEOUT_S:g} s")
        sock = socket.socket(fileno=stream.socket.detach())
        set_buffers(sock, self._sockets)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        resend_soon(sock)
        sock.settimeout(HANDSHAKE_TIMEOUT_S)
        context = self._links.identity.client_context(BULK_ALPN)
        try:
            tls = context.wrap_socket(sock, do_handshake_on_connect=False)
        except BaseException:
            sock.close()
            raise

        def greet() -> None:
            tls.do_handshake()
            found = self._prove(tls)
            if found != peer:
                raise ConnectionBroken(f"another node, {found}, answers there")
            if token is not None:
                tls.sendall(encode_frame(Hello(token)))

        try:
            await in_thread(tls, greet, self._limiter)
        except BaseException:
            tls.close()
            raise
        link = SocketConnection(tls, peer, self._tally, self._limiter)
        link.way = "direct"
        self._proven.add(link)
        return link

    async def dial_and_arrive(self, peer: str, offered: tuple[str, ...], token: str) -> None:
        """Dial for a transfer that is expected *here*. ConnectionBroken when that fails."""
        link = await self.dial(peer, offered, token)
        link.way = "dial-back"
        if not (self.is_expected(token, peer) and self._expected[token].arrive(link)):
            await link.close()
            raise ConnectionBroken("nobody waits for that connection any more")

    async def open_stream(self, peer: str, token: str | None) -> BulkConnection:
        """A libp2p stream to ``peer``, relayed if need be, greeted as by :meth:`dial`. ConnectionBroken."""
        try:
            protocol = WANT_PROTOCOL if token is None else BULK_PROTOCOL
            stream = await self._links.open_stream(peer, protocol)
        except NetworkError as exc:
            raise ConnectionBroken(str(exc)) from exc
        link = StreamConnection(stream, peer, self._tally, self._limiter)
        link.way = "stream"
        if token is None:
            link.knows_want = True
            return link
        try:
            await link.say(Hello(token))
        except BaseException:
            await link.close()
            raise
        return link

    @contextmanager
    def _tracked(self, sock: socket.socket) -> Iterator[trio.lowlevel.TrioToken]:
        with self._lock:
            loop = self._loop
            if loop is None:
                raise ConnectionBroken("this node is closing")
            self._open_sockets.add(sock)
        try:
            yield loop
        finally:
            with self._lock:
                self._open_sockets.discard(sock)

    def _prove(self, tls: ssl.SSLSocket) -> str:
        """The PeerID behind a finished handshake; IdentityError when it is not (any more) trusted."""
        certificate = tls.getpeercert(binary_form=True)
        if certificate is None:
            raise ConnectionBroken("the peer showed no certificate")
        return self._links.identity.check(certificate, presented_chain(tls)).peer_id
