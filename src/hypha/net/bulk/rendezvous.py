"""How the two ends of a file meet: connections are made by whatever way leads to a peer, and answered.

Whoever has a file to send or wants one asks over a connection that was kept, else over a new one, and the
other end answers over that very connection. What it may do is judged by its certificate. One that cannot be
dialled is asked by a request to dial, and names the request's token when it does: from anybody else that
token is worth nothing. Direct connections are dialled and accepted here in threads with short time-outs;
:meth:`Rendezvous.close` ends them all. It is one module, as asking and answering share the connections that
are expected, proven and counted.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import trio

from hypha.config.tuning import SocketTuning
from hypha.errors import IdentityError, NetworkError, PeerUnreachable, Refused
from hypha.messages import Acknowledged, BulkDial, BulkOffer, PeerRef
from hypha.net.bulk.connections import FIRST_WORD_S, BulkConnection, StreamConnection, TransferredBytes
from hypha.net.bulk.kept_connections import KeptConnections
from hypha.net.bulk.sockets import SocketConnection, in_thread, is_trusted
from hypha.net.bulk.ways import Way, Ways
from hypha.net.bulk.wire import (
    BULK_ALPN,
    BULK_PROTOCOL,
    HANDSHAKE_TIMEOUT_S,
    BulkConnections,
    ConnectionBroken,
    Frame,
    Hello,
    Verdict,
    WantFile,
    id_of,
    new_token,
)
from hypha.net.peers.inbound_limits import REMEMBERED, Recent, counted
from hypha.net.sockets import resend_soon, set_buffers
from hypha.pki.certificates import presented_chain
from hypha.tracing import trace_context

logger = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 3.0
DIAL_BACK_TIMEOUT_S = 15.0
#: Addresses of one peer that are tried.
MAX_TARGETS = 4
#: Peers are dialled because they ask to be: so many times at once, and for one peer.
MAX_DIAL_BACKS, MAX_DIAL_BACKS_PER_PEER = 8, 2
#: Whoever asked to be dialled waits for ``DIAL_BACK_TIMEOUT_S``.
_DIAL_BACK_WITHIN_S = 12.0
#: Offers and wants that are being answered, those that wait for their turn included: in all and of one peer.
MAX_ANSWERED = 4096
MAX_ANSWERED_PER_PEER = 64
#: Connections on which one peer begins to speak at once: each takes a thread until its first word is whole.
MAX_HEARD_PER_PEER = 8


@dataclass(eq=False)
class _Expected:
    """A peer that was asked to dial."""

    peer: str
    arrived: trio.Event = field(default_factory=trio.Event)
    link: SocketConnection | None = None


class Rendezvous:
    """Makes connections, and has them answered: ``send`` what a peer wants, ``receive`` what it offers. These
    say whether the connection is as it was before, and raise Refused and ConnectionBroken.
    """

    send: Callable[[BulkConnection, WantFile], Awaitable[bool]]
    receive: Callable[[BulkConnection, BulkOffer], Awaitable[bool]]
    #: whether this node takes or gives files, as a gateway never does
    has_files: Callable[[], bool]

    def __init__(
        self,
        links: BulkConnections,
        kept: KeptConnections,
        tally: TransferredBytes,
        limiter: trio.CapacityLimiter,
        sockets: SocketTuning,
    ) -> None:
        self._links = links
        self._kept = kept
        kept.hear = self._hear
        self._ways = Ways(links)
        self._sockets = sockets
        self._tally = tally
        self._limiter = limiter
        #: by token
        self._expected: dict[str, _Expected] = {}
        #: by peer
        self._heard: Counter[str] = Counter()
        self._answered: Counter[str] = Counter()
        self._dialled_back: Counter[str] = Counter()
        # each keeps a connection open, and half of the descriptors are for everything else
        self._most_answered = min(MAX_ANSWERED, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._lock = threading.Lock()
        self._open_sockets: set[socket.socket] = set()
        #: those that somebody has, as long as he has them
        self._proven: WeakSet[SocketConnection] = WeakSet()
        self._loop: trio.lowlevel.TrioToken | None = None
        #: per peer, the address at which it was last reached
        self._reached: Recent[str, tuple[str, int]] = Recent(REMEMBERED)
        self._nursery: trio.Nursery | None = None
        links.set_stream_handler(BULK_PROTOCOL, self._serve_stream)
        links.answer(BulkDial, self._dial_back)

    def start(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._loop = trio.lowlevel.current_trio_token()

    def close(self) -> None:
        """End the threads that work on connections which nobody has yet."""
        with self._lock:
            self._loop = self._nursery = None
            sockets = list(self._open_sockets)
        for sock in sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    async def cut_untrusted(self) -> None:
        """End connections, also busy ones, whose other end has a certificate that is not trusted any more."""
        for link in list(self._proven):
            if not is_trusted(link, self._links.identity):
                link.cut()
            await trio.lowlevel.checkpoint()

    # --- asking ---------------------------------------------------------------------------------------

    async def ask(
        self, peer: PeerRef | str, first: Callable[[], BulkOffer | WantFile]
    ) -> tuple[BulkConnection, Frame]:
        """Say ``first()``, made anew for each connection, to ``peer``, which is or was connected by then; the
        connection, which is the caller's to release, and the answer. PeerUnreachable when no way leads there,
        ConnectionBroken when the one that did ended, and what ``first`` raises.
        """
        peer_id = id_of(peer)
        link: BulkConnection | None = self._kept.take(peer_id)
        if link is not None:
            try:
                return link, await link.past_working(await link.first_word(first))
            except (ConnectionBroken, trio.Cancelled) as exc:
                # it may have cost a while, and the others that are kept would, too
                self._kept.drop(peer_id)
                if isinstance(exc, trio.Cancelled):
                    raise
                logger.info("A connection that was kept is of no use: %s.", exc, extra={"peer_id": peer_id})
        # each end has to know the other's roles
        await self._links.connect(peer)
        problems = []
        for way in self._ways.to(peer_id):
            try:
                with self._ways.trying(peer_id, way):
                    link = await self._open(peer_id, way)
                    link.way, link.speaks = way, True
                    word = await link.first_word(first)
            except ConnectionBroken as exc:
                problems.append(f"{way}: {exc}")
            else:
                return link, await link.past_working(word)
        self._ways.forget(peer_id)
        raise PeerUnreachable(peer_id, "; ".join(problems))

    async def _open(self, peer: str, way: Way) -> BulkConnection:
        """A new connection. ConnectionBroken says what was tried."""
        if way == "direct":
            return await self.dial(peer, ())
        if way == "dial-back":
            return await self._be_dialled(peer)
        try:
            stream = await self._links.open_stream(peer, BULK_PROTOCOL)
        except NetworkError as exc:
            raise ConnectionBroken(str(exc)) from exc
        return StreamConnection(stream, peer, self._tally, self._limiter)

    async def _be_dialled(self, peer: str) -> SocketConnection:
        token, expected = new_token(), _Expected(peer)
        self._expected[token] = expected
        try:
            request = BulkDial(token=token, addresses=tuple(self._links.bulk_addresses()))
            await self._links.request(peer, request, DIAL_BACK_TIMEOUT_S)
            with trio.move_on_after(FIRST_WORD_S):
                await expected.arrived.wait()
            link, expected.link = expected.link, None
            if link is None:
                raise ConnectionBroken("the peer says that it connected, but nothing came")
            return link
        except NetworkError as exc:
            if isinstance(exc, Refused) and not exc.retryable:
                raise  # such as for a role: by no other way either
            raise ConnectionBroken(str(exc)) from exc
        finally:
            del self._expected[token]
            if expected.link is not None:
                expected.link.close_now()

    async def dial(self, peer: str, offered: tuple[str, ...]) -> SocketConnection:
        """A direct connection to ``peer``. ConnectionBroken says what was tried."""
        targets = (await self._links.bulk_targets(peer, offered))[:MAX_TARGETS]
        if (last := self._reached.get(peer)) in targets:
            targets.remove(last)
            targets.insert(0, last)
        problems = []
        for host, port in targets:
            try:
                link = await self._dial_one(peer, host, port)
            except (OSError, ValueError, ConnectionBroken, IdentityError) as exc:
                problems.append(f"{host}:{port}: {exc}")
            else:
                self._reached[peer] = (host, port)
                return link
        raise ConnectionBroken("; ".join(problems) or "no direct address of it is known")

    async def _dial_one(self, peer: str, host: str, port: int) -> SocketConnection:
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

        def shake_hands() -> None:
            tls.do_handshake()
            found = self._prove(tls)
            if found != peer:
                raise ConnectionBroken(f"another node, {found}, answers there")

        try:
            await in_thread(tls, shake_hands, self._limiter)
        except BaseException:
            tls.close()
            raise
        link = SocketConnection(tls, peer, self._tally, self._limiter)
        self._proven.add(link)
        return link

    # --- answering ------------------------------------------------------------------------------------

    async def _dial_back(self, caller: str, request: BulkDial) -> Acknowledged:
        """The caller has a file, or wants one, and cannot dial this node. What became of each address is for
        the log here alone: nobody looks at other machines' ports through this node.
        """
        if not self.has_files():
            raise Refused("not-found", "this node neither takes nor gives files")
        of_all, of_it = self._dialled_back.total(), self._dialled_back[caller]
        if of_all >= MAX_DIAL_BACKS or of_it >= MAX_DIAL_BACKS_PER_PEER:
            raise Refused("busy", "this node is dialling others already; try again later")
        problem = f"nothing within {_DIAL_BACK_WITHIN_S:g} s"
        with counted(self._dialled_back, caller), trio.move_on_after(_DIAL_BACK_WITHIN_S):
            try:
                link = await self.dial(caller, request.addresses)
                try:
                    await link.say(Hello(request.token))
                except BaseException:
                    await link.close()
                    raise
                link.way = "dial-back"
                if self._nursery is not None:
                    with contextlib.suppress(RuntimeError):  # this node is closing
                        self._nursery.start_soon(self._hear, link)
                        return Acknowledged()
                link.close_now()
            except ConnectionBroken as exc:
                problem = str(exc)
        logger.info("A peer that asks to be dialled cannot be: %s", problem, extra={"peer_id": caller})
        raise Refused("unreachable", "there is no direct connection to any of the caller's addresses")

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

    def _arrived(self, first: Hello | BulkOffer | WantFile, link: SocketConnection) -> None:
        self._proven.add(link)
        if not is_trusted(link, self._links.identity):
            logger.info("A peer is not trusted any more.", extra={"peer_id": link.peer})
        elif isinstance(first, Hello):
            expected = self._expected.get(first.token)
            if expected is not None and expected.peer == link.peer and expected.link is None:
                expected.link = link
                expected.arrived.set()
                return
            logger.info(
                "A peer has dialled that was not asked to, or too late.", extra={"peer_id": link.peer}
            )
        elif self._nursery is not None:
            with contextlib.suppress(RuntimeError):  # this node is closing
                self._nursery.start_soon(self._answer, link, first)
                return
        link.close_now()

    async def _serve_stream(self, stream: Any, caller: str) -> None:
        link = StreamConnection(stream, caller, self._tally, self._limiter)
        link.way = "stream"
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_S):
                first = await link.hear()
        except (ConnectionBroken, trio.TooSlowError) as exc:
            logger.info("Refused an incoming bulk stream: %s", exc, extra={"peer_id": caller})
            await link.close()
        else:
            await self._answer(link, first)

    async def _hear(self, link: SocketConnection) -> None:
        """Answer what the other end, which speaks first, says next; the link is closed or kept then."""
        first: Frame | None = None
        try:
            if self._heard[link.peer] >= MAX_HEARD_PER_PEER:
                raise ConnectionBroken("the peer speaks on too many connections at once")
            with counted(self._heard, link.peer), trio.fail_after(HANDSHAKE_TIMEOUT_S):
                found = await link.hear()
            if not is_trusted(link, self._links.identity):
                raise ConnectionBroken("the peer's certificate is not trusted any more")
            first = found
        except (ConnectionBroken, trio.TooSlowError) as exc:
            logger.debug("A connection that was idle has ended: %s", exc, extra={"peer_id": link.peer})
        except Exception:  # the edge of a task for a peer, as in :meth:`_answer`
            logger.exception("A connection that was idle failed.", extra={"peer_id": link.peer})
        finally:
            if first is None:
                link.close_now()
        if first is not None:
            await self._answer(link, first)

    async def _answer(self, link: BulkConnection, first: Frame) -> None:
        """Do what ``first`` asks for; then the link is kept or closed. Never raises for what a peer does."""
        reusable = False
        try:
            if not isinstance(first, BulkOffer | WantFile):
                raise ConnectionBroken(
                    f"the peer said {type(first).__name__} where an offer or a want was due"
                )
            try:
                of_it = self._answered[link.peer]
                if self._answered.total() >= self._most_answered or of_it >= MAX_ANSWERED_PER_PEER:
                    raise Refused("busy", "too many files are under way here; try again later")
                with counted(self._answered, link.peer), trace_context(first.traceparent):
                    if isinstance(first, BulkOffer):
                        reusable = await self.receive(link, first)
                    else:
                        reusable = await self.send(link, first)
            except Refused as exc:
                await link.say(Verdict("refused", exc.code, exc.reason))
                reusable = True
        except ConnectionBroken as exc:
            logger.info(
                "A transfer that a peer began was interrupted: %s.", exc, extra={"peer_id": link.peer}
            )
        except Exception:  # the edge of a task for a peer: its connection ends, and the node does not
            logger.exception("A transfer that a peer began failed.", extra={"peer_id": link.peer})
        finally:
            await self._kept.release(link, reusable)
