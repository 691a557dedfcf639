"""Getting connected to a peer: all who want the same peer share one attempt; direct addresses are raced
with a small stagger, then come relays: those the peer named, and our own gateway.

The library dials one TCP address a peer, skips loopback and cannot dial circuits, so addresses are given
to it one by one; its own dials (DHT, gossip) are routed through here as well.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from multiaddr import Multiaddr
from opentelemetry.trace import Span, SpanKind, use_span

from hypha.errors import NetworkError, PeerUnreachable
from hypha.messages import MAX_PEER_ID_LENGTH, PeerRef
from hypha.net.addresses import Address, AddressBook, ip_of
from hypha.net.options import Timings
from hypha.net.peers import Peers
from hypha.net.relay import RelayClient
from hypha.net.transport import MutualTls, failure_of
from hypha.telemetry.instruments import CONNECTIONS_FAILED
from hypha.tracing import failed, start_span, traceparent, untraced
from hypha.tracing.operations import CONNECT

logger = logging.getLogger(__name__)


#: How long our own dial may go on when the peer has meanwhile reached us.
MEETING_S = 1.0
ATTEMPTS = 3


@dataclass
class _Attempt:
    done: trio.Event = field(default_factory=trio.Event)
    failure: str = ""
    gone: bool = False


@dataclass
class _Race:
    """Addresses being tried at the same time; ``scope`` ends them all when one has won."""

    scope: trio.CancelScope
    #: what is tried, and how that ends, is noted here
    span: Span
    pending: int = 0
    progress: trio.Event = field(default_factory=trio.Event)
    failures: list[str] = field(default_factory=list)
    #: of the direct addresses that failed, did each refuse the connection?
    refused: list[bool] = field(default_factory=list)
    met: bool = False
    #: why the last address failed, in the words that failures are counted by
    reason: str = "unreachable"

    def note(self, what: str, address: str, reason: str = "") -> None:
        """Note in the span what became of an address."""
        more = {"hypha.reason": reason} if reason else {}
        self.span.add_event(what, {"network.peer.address": address, **more})

    def failed(self, address: str, exc: NetworkError) -> None:
        self.failures.append(f"{address}: {exc}")
        self.refused.append(_says_refused(exc))
        self.reason = failure_of(exc)
        self.note("failed", address, str(exc))
        self.pending -= 1
        self.progress.set()
        self.progress = trio.Event()


class Dialer:
    """Connects to peers. ``own_relays`` names connected gateways to try as relays."""

    def __init__(
        self,
        swarm: Any,
        security: MutualTls,
        book: AddressBook,
        peers: Peers,
        timings: Timings,
        nursery: trio.Nursery,
    ) -> None:
        self._swarm = swarm
        self._security = security
        self._book = book
        self._peers = peers
        self._timings = timings
        self._nursery = nursery
        self._attempts: dict[str, _Attempt] = {}
        self.relay_client: RelayClient | None = None
        self.own_relays: Callable[[], list[str]] = list
        swarm.dial_peer = self._dial_for_library

    async def connect(self, peer: str, relays: bool = True) -> None:
        """Return when ``peer`` is connected; PeerUnreachable when no address worked."""
        if self._peers.is_connected(peer):
            return
        try:
            if len(peer) > MAX_PEER_ID_LENGTH:
                raise ValueError("it is too long")
            ID.from_string(peer)
        except ValueError as exc:
            raise PeerUnreachable(peer[:MAX_PEER_ID_LENGTH], "that is no PeerID") from exc
        if peer == str(self._swarm.get_peer_id()):
            raise PeerUnreachable(peer, "that is this node itself")
        attempt = self._attempts.get(peer)
        if attempt is None:
            attempt = self._attempts[peer] = _Attempt()
            connecting = start_span(CONNECT, {"hypha.peer": peer}, kind=SpanKind.CLIENT)
            with untraced():  # the library's tasks that serve the connection outlive it
                self._nursery.start_soon(self._try, peer, attempt, relays, connecting)
        await attempt.done.wait()
        if not self._peers.is_connected(peer):
            raise PeerUnreachable(peer, attempt.failure or "the connection ended at once", attempt.gone)

    async def _try(self, peer: str, attempt: _Attempt, relays: bool, connecting: Span) -> None:
        began, reason = trio.current_time(), "cancelled"
        try:
            self._swarm.unblock_peer(ID.from_string(peer))
            for _ in range(ATTEMPTS):
                race = await self._race(peer, relays, connecting)
                reason = race.reason
                attempt.failure = "; ".join(race.failures) or "no address of it is known"
                attempt.gone = bool(race.refused) and all(race.refused)
                # both sides dialled at once and each gave its own connection up for the other's
                if self._peers.is_connected(peer) or not race.met:
                    break
        finally:
            del self._attempts[peer]
            attempt.done.set()
            if not self._peers.is_connected(peer) and reason != "cancelled":
                CONNECTIONS_FAILED.add(direction="outbound", reason=reason)
                connecting.set_attribute("error.type", reason)
                failed(connecting, attempt.failure)
                took_s = trio.current_time() - began
                logger.debug(
                    "No connection after %.3f s: %s.", took_s, attempt.failure, extra={"peer_id": peer}
                )
            connecting.end()

    async def _race(self, peer: str, relays: bool, connecting: Span) -> _Race:
        async with trio.open_nursery() as nursery:
            race = _Race(nursery.cancel_scope, connecting)
            nursery.start_soon(self._end_when_connected, peer, race)
            started = trio.current_time()
            for address in self._book.direct(peer):
                race.pending += 1
                before = len(race.failures)
                nursery.start_soon(self._contend, peer, address, race)
                with trio.move_on_after(self._timings.stagger_s):
                    while len(race.failures) == before:
                        await race.progress.wait()
            with trio.move_on_at(started + self._timings.relay_after_s):
                while race.pending:
                    await race.progress.wait()
            if relays:
                await self._through_relays(peer, race)
            while race.pending:
                await race.progress.wait()
            race.scope.cancel()
        return race

    async def _end_when_connected(self, peer: str, race: _Race) -> None:
        """The peer may reach us first. When both dial at once, one side must hold on to its own dial, or
        each would give up the connection that the other has just settled for: the smaller PeerID does.
        """
        await self._peers.wait_connected(peer)
        race.met = True
        if str(self._swarm.get_peer_id()) < peer:
            await trio.sleep(MEETING_S)
        race.scope.cancel()

    async def _contend(self, peer: str, address: Address, race: _Race) -> None:
        race.note("dialling", address.transport)
        try:
            await self._dial(peer, address)
        except NetworkError as exc:
            race.failed(address.transport, exc)
        else:
            race.note("connected", address.transport)
            race.scope.cancel()

    async def _dial(self, peer: str, address: Address) -> None:
        """Dial one direct address; NetworkError with a short reason when it fails."""
        try:
            with trio.fail_after(self._timings.dial_s):
                for place in await self._resolve(address):
                    await self._swarm.dial_addr(Multiaddr(f"{place}/p2p/{peer}"), ID.from_string(peer))
                    return
        except trio.TooSlowError as exc:
            raise NetworkError(f"no answer within {self._timings.dial_s:g} s") from exc
        except Exception as exc:  # whoever listens there has proven nothing yet, and says what it likes
            if "expected peer" in str(exc):
                self._book.forget(peer, address)
            raise NetworkError(_root_cause(exc)) from exc
        raise NetworkError("all its addresses are excluded")

    async def _resolve(self, address: Address) -> list[str]:
        """``address`` with a name replaced as the system resolves it (hosts file included)."""
        if ip_of(address) is not None:
            return [address.transport]
        parts = address.transport.split("/")
        family = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}.get(parts[1], socket.AF_UNSPEC)
        found = []
        for _, _, _, _, sockaddr in await trio.socket.getaddrinfo(
            parts[2], None, family=family, type=socket.SOCK_STREAM
        ):
            kind = "ip6" if ":" in str(sockaddr[0]) else "ip4"
            place = "/".join(["", kind, str(sockaddr[0]), *parts[3:]])
            if place not in found:
                found.append(place)
        return found

    async def _through_relays(self, peer: str, race: _Race) -> None:
        if self.relay_client is None:
            return
        named = {one.relay: one for one in self._book.circuits(peer) if one.relay is not None}
        candidates = [relay for relay in named if self._peers.is_connected(relay)]
        candidates += [relay for relay in self.own_relays() if relay not in candidates]
        candidates += [relay for relay in named if relay not in candidates]
        for relay in candidates:
            if relay == peer:
                continue
            if relay in named:
                self._book.learn(PeerRef(peer=relay, addresses=(f"{named[relay].transport}/p2p/{relay}",)))
            circuit = f"/p2p/{relay}/p2p-circuit"
            race.note("dialling", circuit)
            try:
                await self.connect(relay, relays=False)
                with trio.fail_after(2 * self._timings.dial_s):
                    with use_span(race.span):
                        parent = traceparent()
                    await self.relay_client.dial(relay, peer, parent)
            except NetworkError as exc:
                race.failures.append(str(exc))
                race.note("failed", circuit, str(exc))
            except trio.TooSlowError:
                race.failures.append(f"relay {relay} brought no connection in time")
                race.note("failed", circuit, "it brought no connection in time")
            else:
                race.note("connected", circuit)
                self._say_why_relayed(peer)
                race.scope.cancel()
                return

    def _say_why_relayed(self, peer: str) -> None:
        left_out = self._book.left_out(peer)
        if left_out and not self._book.direct(peer):
            logger.info(
                "%s is reached through a relay: its addresses (%s) lie in exclude_cidr, so they are not "
                "dialled. Take their network out of it if this machine can reach them.",
                peer,
                ", ".join(left_out),
                extra={"peer_id": peer},
            )

    async def who_is_at(self, address: Address) -> str:
        """The PeerID of the certified node at ``address``; NetworkError when there is none."""
        reason = "its name has no address"
        try:
            places = await self._resolve(address)
        except Exception as exc:  # a name that the resolver does not know, or cannot even encode
            raise NetworkError(f"{address.transport}: {_root_cause(exc)}") from exc
        for place in places:
            try:
                with trio.fail_after(self._timings.dial_s):
                    transport = self._swarm.transport_manager.transport_for_dialing(Multiaddr(place))
                    raw = await transport.dial(Multiaddr(place))
                    negotiation = self._swarm.upgrader.security_multistream
                    try:
                        await negotiation.select_transport_and_protocol(raw, True)
                        connection = await self._security.secure_anybody(raw)
                        peer = str(connection.get_remote_peer())
                        await connection.close()
                    finally:
                        await raw.close()
                    return peer
            except trio.TooSlowError:
                reason = f"no answer within {self._timings.dial_s:g} s"
            except Exception as exc:  # noqa: BLE001 - as in _dial
                reason = _root_cause(exc)
        raise NetworkError(f"{address.transport}: {reason}")

    async def _dial_for_library(self, peer_id: ID) -> list[Any]:
        """What the library calls to dial a peer by itself."""
        peer = str(peer_id)
        try:
            await self.connect(peer)
        except PeerUnreachable as exc:
            raise SwarmException(str(exc)) from exc
        connections: list[Any] = self._swarm.get_connections(peer_id)
        return connections


def _says_refused(exc: BaseException | None) -> bool:
    """Is "connection refused", the answer of a machine on which nobody listens, at the bottom of ``exc``?"""
    while exc is not None:
        if isinstance(exc, OSError) and exc.errno == errno.ECONNREFUSED:
            return True
        if isinstance(exc, ExceptionGroup):
            return all(_says_refused(part) for part in exc.exceptions)
        exc = exc.__cause__
    return False


def _root_cause(exc: BaseException) -> str:
    """The reason at the bottom of the library's chain of wrappers, in one line."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    if isinstance(exc, ExceptionGroup):
        exc = exc.exceptions[0]
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return (str(exc) or type(exc).__name__).splitlines()[0]
