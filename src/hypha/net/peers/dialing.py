"""Getting connected to a peer: all who want the same peer share one attempt; direct addresses are raced
with a small stagger, then come relays: those the peer named, and our own gateway.

The library dials one TCP address a peer, skips loopback and cannot dial circuits, so addresses are given
to it one by one; its own dials (DHT, gossip) are routed through here as well.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from multiaddr import Multiaddr
from opentelemetry.trace import Span, SpanKind, use_span

from hypha.errors import NetworkError, PeerUnreachable
from hypha.messages import MAX_PEER_ID_LENGTH, PeerRef
from hypha.naming import shown
from hypha.net.libp2p.mutual_tls import MutualTls, OtherPeer
from hypha.net.libp2p.relay import RelayClient
from hypha.net.libp2p.streams import STREAM_ERRORS
from hypha.net.options import Timings
from hypha.net.peers.addresses import MAX_ADDRESSES, Address, AddressBook, ip_of, parse
from hypha.net.peers.inbound_limits import Recent
from hypha.net.peers.reasons import ShutOut, failure_of, is_of_certificate, reason_of, root_of, says_refused
from hypha.net.peers.table import PeerTable, address_of, direction_of, is_relayed
from hypha.telemetry.instruments import CONNECTIONS_FAILED
from hypha.tracing import failed, start_span, traceparent, untraced
from hypha.tracing.operations import CONNECT

logger = logging.getLogger(__name__)

T = TypeVar("T")
#: What may come of a dial: from any layer of the library, and of what is no text where text was due.
DIAL_ERRORS = (*STREAM_ERRORS, ValueError)


#: How long our own dial may go on when the peer has meanwhile reached us.
MEETING_S = 1.0
ATTEMPTS = 3
#: The next address of a peer is tried after this long, while the first one still hangs.
STAGGER_S = 0.25
#: of so many peers it is remembered why they are relayed, so that it is not said again and again
MAX_RELAYED_TOLD = 1000


@dataclass
class _Attempt:
    done: trio.Event = field(default_factory=trio.Event)
    failure: str = ""
    gone: bool = False


class Dialer:
    """Connects to peers. ``own_relays`` names connected gateways to try as relays."""

    relay_client: RelayClient
    own_relays: Callable[[], list[str]]

    def __init__(
        self,
        swarm: Any,
        security: MutualTls,
        book: AddressBook,
        peers: PeerTable,
        timings: Timings,
        nursery: trio.Nursery,
    ) -> None:
        self._swarm = swarm
        self._security = security
        self._book = book
        #: who is connected, and may be used for what
        self.peers = peers
        self._timings = timings
        self._nursery = nursery
        self._attempts: dict[str, _Attempt] = {}
        self._shut_out = ShutOut(timings.reconnect_max_s)
        # certificates and revocation lists are others now
        peers.on_identity.append(self._shut_out.clear)
        #: why, as it was said last, by peer
        self._relayed_for: Recent[str, str] = Recent(MAX_RELAYED_TOLD)
        swarm.dial_peer = self._dial_for_library

    async def connect(self, peer: str, relays: bool = True) -> None:
        """Return when ``peer`` is connected; PeerUnreachable when no address worked."""
        if self.peers.is_connected(peer):
            return
        try:
            if len(peer) > MAX_PEER_ID_LENGTH:
                raise ValueError("it is too long")
            ID.from_string(peer)
        except ValueError as exc:
            raise PeerUnreachable(peer[:MAX_PEER_ID_LENGTH], "that is no PeerID") from exc
        if peer == str(self._swarm.get_peer_id()):
            raise PeerUnreachable(
                peer,
                "that is this node itself, or another one that uses the same certificate; make one for each "
                "machine (`hypha-certutil node`)",
            )
        attempt = self._attempts.get(peer)
        if attempt is None:
            self._shut_out.check(peer)
            attempt = self._attempts[peer] = _Attempt()
            connecting = start_span(CONNECT, {"hypha.peer": peer}, kind=SpanKind.CLIENT)
            with untraced():  # the library's tasks that serve the connection outlive it
                self._nursery.start_soon(self._try, peer, attempt, relays, connecting)
        await attempt.done.wait()
        if not self.peers.is_connected(peer):
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
                if race.shut_out:
                    self._shut_out.note(peer, attempt.failure)
                # both sides dialled at once and each gave its own connection up for the other's
                if self.peers.is_connected(peer) or not race.met:
                    break
        finally:
            del self._attempts[peer]
            attempt.done.set()
            if self.peers.is_connected(peer):
                self._shut_out.forget(peer)
            if not self.peers.is_connected(peer) and reason != "cancelled":
                CONNECTIONS_FAILED.add(direction="outbound", reason=reason)
                connecting.set_attribute("error.type", reason)
                failed(connecting, attempt.failure)
                took_s = trio.current_time() - began
                logger.debug(
                    "No connection after %.3f s: %s.", took_s, attempt.failure, extra={"peer_id": peer}
                )
            connecting.end()

    async def _race(self, peer: str, relays: bool, connecting: Span) -> DialRace:
        async with trio.open_nursery() as nursery:
            race = DialRace(nursery.cancel_scope, connecting)
            nursery.start_soon(self._end_when_connected, peer, race)
            started = trio.current_time()
            for address in self._book.direct(peer):
                race.pending += 1
                before = len(race.failures)
                nursery.start_soon(self._contend, peer, address, race)
                with trio.move_on_after(STAGGER_S):
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
        # said here, as whoever has brought the connection may be cancelled before it hears of that
        for connection in self.peers.connections_of(peer)[:1]:
            race.note("connected", address_of(connection))
            if is_relayed(connection) and direction_of(connection) == "outbound":
                self._say_why_relayed(peer, race.direct)
        return race

    async def _end_when_connected(self, peer: str, race: DialRace) -> None:
        """The peer may reach us first. When both dial at once, one side must hold on to its own dial, or
        each would give up the connection that the other has just settled for: the smaller PeerID does. A
        connection of our own is left to the dial that has made it: cancelled before it returns, it would
        close that connection again.
        """
        await self.peers.wait_connected(peer)
        if any(direction_of(one) == "outbound" for one in self.peers.connections_of(peer)):
            return
        race.met = True
        if str(self._swarm.get_peer_id()) < peer:
            await trio.sleep(MEETING_S)
        race.scope.cancel()

    async def _contend(self, peer: str, address: Address, race: DialRace) -> None:
        race.note("dialling", address.transport)
        try:
            await self._dial(peer, address)
        except NetworkError as exc:
            race.failed(address.transport, exc)
        else:
            race.scope.cancel()

    async def _dial(self, peer: str, address: Address) -> None:
        """Dial one direct address; NetworkError with a short reason when it fails."""

        async def dial(place: str) -> None:
            try:
                await self._swarm.dial_addr(Multiaddr(f"{place}/p2p/{peer}"), ID.from_string(peer))
            except DIAL_ERRORS as exc:
                if isinstance(root_of(exc), OtherPeer):
                    self._book.forget(peer, address)
                raise

        await self._first_of(address, dial, self._book.may_lead_anywhere(peer, address))

    async def _first_of(self, address: Address, dial: Callable[[str], Awaitable[T]], anywhere: bool) -> T:
        """What ``dial`` returns for the first place of ``address`` where it works. A name may have several:
        each is tried a moment after the one before, as any of them may be dead. NetworkError says of all why
        not.
        """
        wanted = await self.places(address, anywhere)
        found: list[T] = []
        failures: list[NetworkError] = []
        async with trio.open_nursery() as nursery:

            async def attempt(place: str, ended: trio.Event) -> None:
                try:
                    found.append(await self._timely(dial, place))
                except NetworkError as exc:
                    failures.append(exc if len(wanted) == 1 else _at(place, exc))
                    ended.set()
                else:
                    nursery.cancel_scope.cancel()

            for place in wanted:
                ended = trio.Event()
                nursery.start_soon(attempt, place, ended)
                with trio.move_on_after(STAGGER_S):
                    await ended.wait()
        if found:
            return found[0]
        if len(failures) == 1:
            raise failures[0]
        raise NetworkError("; ".join(map(str, failures))) from ExceptionGroup("all of them", failures)

    async def _timely(self, dial: Callable[[str], Awaitable[T]], place: str) -> T:
        try:
            with trio.fail_after(self._timings.dial_s):
                return await dial(place)
        except trio.TooSlowError as exc:
            raise NetworkError(f"no answer within {self._timings.dial_s:g} s") from exc
        except Exception as exc:  # whoever listens there has proven nothing yet, and says what it likes
            raise NetworkError(reason_of(exc)) from exc

    async def places(self, address: Address, anywhere: bool) -> list[str]:
        """Where ``address`` may be dialled, by IP; ``anywhere``: even where exclude_cidr has it. NetworkError
        when there is no such place.
        """
        places = await self._resolve(address)
        wanted = [place for place in places if anywhere or not self._book.excluded(parse(place))]
        if not wanted:
            raise NetworkError(
                "all its addresses are in exclude_cidr" if places else "the name has no address"
            )
        return wanted

    async def _resolve(self, address: Address) -> list[str]:
        """``address`` by IP, its name resolved as the system does it (hosts file included). NetworkError."""
        if ip_of(address) is not None:
            return [address.transport]
        parts = address.transport.split("/")
        family = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}.get(parts[1], socket.AF_UNSPEC)
        try:
            with trio.fail_after(self._timings.dial_s):
                answers = await trio.socket.getaddrinfo(
                    parts[2], None, family=family, type=socket.SOCK_STREAM
                )
        except trio.TooSlowError as exc:
            raise NetworkError(
                f"no answer to what address its name has, for {self._timings.dial_s:g} s"
            ) from exc
        except (OSError, UnicodeError) as exc:
            raise NetworkError(reason_of(exc)) from exc
        hosts = dict.fromkeys(str(sockaddr[0]).partition("%")[0] for *_, sockaddr in answers)
        return [
            "/".join(["", "ip6" if ":" in host else "ip4", host, *parts[3:]])
            for host in list(hosts)[:MAX_ADDRESSES]
        ]

    async def _through_relays(self, peer: str, race: DialRace) -> None:
        named = {one.relay: one for one in self._book.circuits(peer) if one.relay is not None}
        candidates = [relay for relay in named if self.peers.is_connected(relay)]
        candidates += [relay for relay in self.own_relays() if relay not in candidates]
        candidates += [relay for relay in named if relay not in candidates]
        race.direct = list(race.failures)
        for relay in candidates:
            if relay == peer:
                continue
            if relay in named:
                self._book.learn(PeerRef(peer=relay, addresses=(f"{named[relay].transport}/p2p/{relay}",)))
            circuit = f"/p2p/{relay}/p2p-circuit"
            race.note("dialling", circuit)
            try:
                await self.connect(relay, relays=False)
                # the peer itself has named it
                self.peers.require_service("relay", relay)
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
                race.scope.cancel()
                return

    def _say_why_relayed(self, peer: str, failures: list[str]) -> None:
        """Why ``peer`` is reached through a relay, once for each reason; ``failures`` of direct dials."""
        direct = [address.transport for address in self._book.direct(peer)]
        if left_out := self._book.left_out(peer):
            why = (
                f"its addresses ({', '.join(left_out)}) lie in exclude_cidr, so they are not dialled. Take "
                "their network out of it if this machine can reach them"
            )
        elif direct:
            slow = f"no answer from {', '.join(direct)} within {self._timings.relay_after_s:g} s"
            why = (
                f"none of its addresses could be dialled ({'; '.join(failures) or slow}). For direct "
                "transfers open its port to this machine, or set its external_addresses"
            )
        else:
            why = (
                "it announces no address of its own. If this machine can reach it, set its "
                "external_addresses, or take its network out of its exclude_cidr"
            )
        if self._relayed_for.get(peer) != why:
            logger.info("%s is reached through a relay: %s.", shown(peer), why, extra={"peer_id": peer})
        self._relayed_for[peer] = why

    async def who_is_at(self, address: Address) -> str:
        """The PeerID of the certified node at ``address``; NetworkError when there is none."""

        async def ask(place: str) -> str:
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

        try:
            return await self._first_of(address, ask, anywhere=True)
        except NetworkError as exc:
            raise _at(address.transport, exc) from exc.__cause__

    async def _dial_for_library(self, peer_id: ID) -> list[Any]:
        peer = str(peer_id)
        try:
            await self.connect(peer)
        except PeerUnreachable as exc:
            raise SwarmException(str(exc)) from exc
        connections: list[Any] = self._swarm.get_connections(peer_id)
        return connections


def _at(place: str, exc: NetworkError) -> NetworkError:
    told = NetworkError(f"{place}: {exc}")
    told.__cause__ = exc.__cause__
    return told


@dataclass
class DialRace:
    """Addresses being tried at the same time; ``scope`` ends them all when one has won."""

    scope: trio.CancelScope
    #: what is tried, and how that ends, is noted here
    span: Span
    pending: int = 0
    progress: trio.Event = field(default_factory=trio.Event)
    failures: list[str] = field(default_factory=list)
    #: those of them that were known when relays were tried
    direct: list[str] = field(default_factory=list)
    #: of the direct addresses that failed, did each refuse the connection?
    refused: list[bool] = field(default_factory=list)
    met: bool = False
    #: whether the peer itself refuses this node's certificate, or this node the peer's
    shut_out: bool = False
    #: why the last address failed, in the words that failures are counted by
    reason: str = "unreachable"

    def note(self, what: str, address: str, reason: str = "") -> None:
        more = {"hypha.reason": reason} if reason else {}
        self.span.add_event(what, {"network.peer.address": address, **more})

    def failed(self, address: str, exc: NetworkError) -> None:
        self.failures.append(f"{address}: {exc}")
        self.refused.append(says_refused(exc))
        self.reason = failure_of(exc)
        self.shut_out = self.shut_out or is_of_certificate(root_of(exc))
        self.note("failed", address, str(exc))
        self.pending -= 1
        self.progress.set()
        self.progress = trio.Event()
