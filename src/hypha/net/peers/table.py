"""The table of live connections: who is connected, how, since when somebody was last heard, and when the
last connection to a peer ended. It cuts connections that fell silent and those whose certificate is no
longer accepted.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import trio
from libp2p.abc import ConnectionType, INotifee
from libp2p.peer.id import ID
from libp2p.rcmgr import Direction
from libp2p.stream_muxer.yamux.yamux import FLAG_SYN, TYPE_PING, YAMUX_HEADER_FORMAT

from hypha.access import SERVICES, carries, may_act_as, named
from hypha.errors import IdentityError, PeerUnreachable
from hypha.net.libp2p.streams import STREAM_ERRORS
from hypha.net.libp2p.tls_connection import TlsConnection
from hypha.net.options import Timings
from hypha.net.peers.inbound_limits import Recent
from hypha.node import Changes, ConnectionInfo, Listeners, PeerLost
from hypha.pki.identity import Identity, Vouched
from hypha.telemetry.instruments import CONNECTIONS_ESTABLISHED, CONNECTIONS_LOST

logger = logging.getLogger(__name__)

#: What a watcher may leave unread; the oldest losses go first (who is connected can be asked).
WATCH_BACKLOG = 4096
#: Why this node ends a connection: a label of a metric.
Cut = Literal["silent", "revoked", "double"]
REMEMBERED_ROLES = 20_000
#: How often live connections' certificates are checked again (for expiry).
CHECK_S = 60.0


def secured(connection: Any) -> TlsConnection:
    """The TLS connection below a swarm connection (there is no other kind)."""
    tls: TlsConnection = connection.muxed_conn.secured_conn
    return tls


def is_relayed(connection: Any) -> bool:
    return bool(secured(connection).get_connection_type() == ConnectionType.RELAYED)


def way_of(connection: Any) -> Literal["direct", "relayed"]:
    return "relayed" if is_relayed(connection) else "direct"


def direction_of(connection: Any) -> Literal["inbound", "outbound"]:
    """Who dialled: ``outbound`` where this node did."""
    return "inbound" if connection.direction == Direction.INBOUND else "outbound"


def address_of(connection: Any) -> str:
    """The transport address at the other end of a swarm connection, "" when the socket has none."""
    addresses = secured(connection).get_transport_addresses()
    return str(addresses[0]) if addresses else ""


class PeerTable(INotifee):  # type: ignore[misc]
    """Who is connected. Listens to the swarm; ``on_lost`` are called when a peer is gone altogether."""

    def __init__(self, swarm: Any, identity: Identity, timings: Timings, nursery: trio.Nursery) -> None:
        self._swarm = swarm
        self._identity = identity
        self._timings = timings
        self._nursery = nursery
        behind = "A watcher of lost peers is far behind; it misses one."
        self._watchers = Listeners[PeerLost](WATCH_BACKLOG, lambda: logger.warning(behind))
        #: a channel of those that are lost, from now on
        self.watch = self._watchers.listen
        #: notes each connection that is made or ends
        self._changes = Changes()
        #: of peers that are or were connected
        self._vouched: Recent[str, Vouched] = Recent(REMEMBERED_ROLES)
        #: connections that this node ended, and why
        self._cuts: dict[Any, Cut] = {}
        self.on_connected: list[Callable[[str], object]] = []
        self.on_lost: list[Callable[[str], None]] = []
        #: called when certificate, trust bundle or revocation lists were read again
        self.on_identity: list[Callable[[], None]] = []
        #: called when it may be that certificates are not accepted any more which were
        self.on_doubt: list[Callable[[], Awaitable[None]]] = []
        swarm.register_notifee(self)

    def connections_of(self, peer: str) -> list[Any]:
        """The swarm's live connections to ``peer``."""
        try:
            peer_id = ID.from_string(peer)
        except ValueError:
            return []
        return [one for one in self._swarm.get_connections(peer_id) if not one.is_closed]

    def is_connected(self, peer: str) -> bool:
        return bool(self.connections_of(peer))

    def connections(self) -> list[ConnectionInfo]:
        found = []
        for connection in self._swarm.get_connections():
            tls = secured(connection)
            found.append(
                ConnectionInfo(
                    peer=str(connection.muxed_conn.peer_id),
                    address=address_of(connection),
                    kind=way_of(connection),
                    direction=direction_of(connection),
                    roles=tls.roles,
                    round_trip_s=connection.muxed_conn.rtt() or None,
                    name=tls.name,
                    organization=tls.organization,
                )
            )
        return found

    def roles_of(self, peer: str) -> frozenset[str]:
        """Roles in the certificate of a peer, as of its last connection; empty: any role.

        PeerUnreachable for a peer that never was connected, rather than a guess.
        """
        return self._vouched_of(peer).roles

    def organization_of(self, peer: str) -> str:
        """The organisation that vouches for a peer, as of its last connection; as :meth:`roles_of`."""
        return self._vouched_of(peer).organization

    def inbound(self) -> list[Any]:
        """The swarm's live connections that others have dialled."""
        found = self._swarm.get_connections()
        return [one for one in found if not one.is_closed and one.direction == Direction.INBOUND]

    def carrying(self, role: str) -> list[str]:
        """PeerIDs of connected peers whose certificates carry ``role``."""
        found = [one for one in self._swarm.get_connections() if not one.is_closed]
        return list(dict.fromkeys(str(one.muxed_conn.peer_id) for one in found if role in secured(one).roles))

    def may_serve_as(self, service: str, peer: str) -> bool:
        """Whether a peer that is or was connected may be used as ``service``."""
        try:
            return may_act_as(self.roles_of(peer), SERVICES[service].by)
        except PeerUnreachable:
            return False

    def require_service(self, service: str, peer: str) -> None:
        """PeerUnreachable unless a connected peer may be used as ``service``."""
        has, allowed = self.roles_of(peer), SERVICES[service].by
        if not may_act_as(has, allowed):
            raise PeerUnreachable(
                peer,
                f"it is not used as {service}, which needs a certificate with the role {named(allowed)}: "
                f"this one carries {carries(has)}",
            )

    def _vouched_of(self, peer: str) -> Vouched:
        # the swarm has a connection for a moment before it says so
        for connection in reversed(self.connections_of(peer)):
            return secured(connection).vouched
        try:
            return self._vouched[peer]
        except KeyError:
            raise PeerUnreachable(peer, "it never was connected, so its roles are unknown") from None

    async def wait_connected(self, peer: str) -> None:
        """Return when ``peer`` is connected."""
        seen = self._changes.count
        while not self.is_connected(peer):
            seen = await self._changes.wait(seen)

    async def wait_lost(self, peer: str, connections: list[Any]) -> None:
        """Return when all these ``connections`` to ``peer`` have ended, even if somebody else has connected
        again by then: what the peer kept for those connections is gone.
        """
        seen = self._changes.count
        while any(one in connections for one in self.connections_of(peer)):
            seen = await self._changes.wait(seen)

    async def connected(self, network: Any, conn: Any) -> None:
        peer = str(conn.muxed_conn.peer_id)
        direction, way = direction_of(conn), way_of(conn)
        CONNECTIONS_ESTABLISHED.add(direction=direction, way=way)
        logger.debug("Connected with %s (%s, %s).", peer, direction, way, extra={"peer_id": peer})
        self._vouched[peer] = secured(conn).vouched
        self._changes.note()
        for call in self.on_connected:
            call(peer)

    async def disconnected(self, network: Any, conn: Any) -> None:
        self._changes.note()
        peer = str(conn.muxed_conn.peer_id)
        reason = self._cuts.pop(conn, "limit" if conn.muxed_conn.breach else "closed")
        CONNECTIONS_LOST.add(reason=reason)
        direction, way = direction_of(conn), way_of(conn)
        logger.debug(
            "The connection with %s (%s, %s) is over: %s.",
            peer,
            direction,
            way,
            reason,
            extra={"peer_id": peer},
        )
        if self.is_connected(peer):
            return
        for call in self.on_lost:
            call(peer)
        self._watchers.tell(PeerLost(peer, reason == "revoked"))

    async def opened_stream(self, network: Any, stream: Any) -> None: ...

    async def closed_stream(self, network: Any, stream: Any) -> None: ...

    async def listen(self, network: Any, multiaddr: Any) -> None: ...

    async def listen_close(self, network: Any, multiaddr: Any) -> None: ...

    async def close(self, peer: str) -> None:
        for connection in self.connections_of(peer):
            await connection.close()

    async def close_all(self) -> None:
        """Close everything at once; the library would take 0.2 s for each in turn."""
        async with trio.open_nursery() as nursery:
            for connection in self._swarm.get_connections():
                nursery.start_soon(connection.close)

    async def cut(self, connection: Any, reason: Cut, why: str) -> None:
        """End a connection at once, without a goodbye; ``why`` is for people."""
        peer = str(connection.muxed_conn.peer_id)
        if not connection.is_closed:
            self._cuts[connection] = reason
        logger.warning("Cut the connection with %s: %s.", peer, why, extra={"peer_id": peer})
        await secured(connection).abort()
        await connection.close()

    async def keep_alive(self) -> None:
        """Cut connections over which nothing comes; probe those that are quiet.

        The library's monitor opens a stream for each ping, one connection after the other, so one
        stopped peer delays finding the next. Here a quiet connection gets a 12-byte ping frame, and
        only when its last byte came in counts.
        """
        limit = self._timings.silence_s
        tick = limit / 4
        due = trio.current_time() + tick
        while True:
            await trio.sleep_until(due)
            now = trio.current_time()
            late = now - due > tick
            due = now + tick
            if late:
                continue  # this process was stopped or busy: what came in meanwhile is still unread
            for connection in self._swarm.get_connections():
                silence = now - secured(connection).last_received
                if silence > limit:
                    why = f"nothing was heard for {silence:.1f} s"
                    self._nursery.start_soon(self.cut, connection, "silent", why)
                elif silence > tick:
                    self._nursery.start_soon(self.probe, connection.muxed_conn)

    async def probe(self, muxed: Any) -> None:
        """Have the other end send something."""
        if muxed._write_lock.locked():
            return  # somebody is sending: the probe would wait behind, and is not needed
        try:
            await muxed._write_frame(struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_PING, FLAG_SYN, 0, 0))
        except STREAM_ERRORS as exc:
            logger.debug("A probe could not be sent: %r", exc)

    async def watch_identity(self) -> None:
        """Re-read changed identity files; close connections whose certificate is no longer accepted."""
        next_check = trio.current_time() + CHECK_S
        while True:
            await trio.sleep(self._timings.identity_poll_s)
            due = trio.current_time() >= next_check
            await self.reload_identity(check=due)
            if due:
                next_check = trio.current_time() + CHECK_S

    async def reload_identity(self, check: bool = True) -> bool:
        """Re-read the files if they changed; True if they did. Errors are logged, the old ones stay."""
        changed = False
        try:
            changed = await trio.to_thread.run_sync(self._identity.reload)
        except IdentityError as exc:
            logger.error("The changed identity files cannot be used, the old ones stay in force: %s", exc)
        if changed:
            logger.info("The identity files were read again.")
            for call in self.on_identity:
                call()
        if changed or check:
            for connection in self._swarm.get_connections():
                try:
                    self._identity.check(secured(connection).certificate)
                except IdentityError as exc:
                    why = f"its certificate is refused now ({exc})"
                    self._nursery.start_soon(self.cut, connection, "revoked", why)
                await trio.lowlevel.checkpoint()
            for cut in self.on_doubt:
                await cut()
        return changed
